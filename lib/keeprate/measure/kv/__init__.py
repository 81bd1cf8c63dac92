"""Measure KV-cache methods: what they keep, what it costs the answer, what it costs in bytes and time.

Every method of a comparison reads the same prompts, so the model reads them once: `prefill` records what its attention
layers saw, and `Prefill.resume` lets a method compress that, through the very code that runs inside the model. `study`
and `perplexity` do this for recall and for text, with one row per method and sample; `summarise` turns rows into
numbers with intervals.

Question known: the prompt that is compressed ends with the question. Question unknown: the prompt is the context alone,
and the question comes after the compression.
"""

from keeprate.measure.kv.cost import generation_cost, prefill_cost, scoring_memory
from keeprate.measure.kv.experiments import Methods, given, perplexity, rows, study
from keeprate.measure.kv.judge import Judge, found, kl, output_error, rank_correlation, recall_at_budget, votes
from keeprate.measure.kv.reading import QUESTIONS, Prefill, Resumed, one_by_one, prefill, split
from keeprate.measure.kv.truth import (
    ATTENTION_TRUTHS,
    TRUTHS,
    Scores,
    grad_x_input,
    leave_one_out,
    leave_one_out_loss,
    oracle,
    truths,
)
from keeprate.measure.table import summarise

__all__ = [
    "ATTENTION_TRUTHS",
    "QUESTIONS",
    "TRUTHS",
    "Judge",
    "Methods",
    "Prefill",
    "Resumed",
    "Scores",
    "found",
    "generation_cost",
    "given",
    "grad_x_input",
    "kl",
    "leave_one_out",
    "leave_one_out_loss",
    "one_by_one",
    "oracle",
    "output_error",
    "perplexity",
    "prefill",
    "prefill_cost",
    "rank_correlation",
    "recall_at_budget",
    "rows",
    "scoring_memory",
    "split",
    "study",
    "summarise",
    "truths",
    "votes",
]
