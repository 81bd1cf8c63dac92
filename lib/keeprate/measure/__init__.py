"""Measure: accuracy with intervals, cost (FLOPs, time, memory), and whether a score finds the tokens that matter."""

from keeprate.measure import kv, mllm, sft
from keeprate.measure.accuracy import Evaluation, evaluate
from keeprate.measure.cost import Speed, flops, flops_estimate, operations, peak_memory, race, speed
from keeprate.measure.interval import Interval, bootstrap, paired_difference, wilson
from keeprate.measure.truth import Localisation, auroc, localisation, recall, recall_at_budget

__all__ = [
    "Evaluation",
    "Interval",
    "Localisation",
    "Speed",
    "auroc",
    "bootstrap",
    "evaluate",
    "flops",
    "flops_estimate",
    "kv",
    "localisation",
    "mllm",
    "operations",
    "paired_difference",
    "peak_memory",
    "race",
    "recall",
    "recall_at_budget",
    "sft",
    "speed",
    "wilson",
]
