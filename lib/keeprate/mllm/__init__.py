"""Visual tokens in multimodal language models: which to keep before and inside the language model."""

from keeprate.mllm.base import BeforeMethod, Choice, Inside, InsideMethod, MLLMMethod, Visual, Wrapper
from keeprate.mllm.baselines import OracleVisual, Pooling, RandomInside, RandomVisual, UniformGrid
from keeprate.mllm.btp import BTP
from keeprate.mllm.corematching import CoreMatching, Knee
from keeprate.mllm.dart import DART
from keeprate.mllm.debiasing import AttentionDebiasing
from keeprate.mllm.divprune import DivPrune
from keeprate.mllm.fastervlm import FasterVLM
from keeprate.mllm.fastv import FastV
from keeprate.mllm.ficoco import FiCoCo
from keeprate.mllm.flowcut import FlowCut
from keeprate.mllm.fopru import FoPru
from keeprate.mllm.gap import GAP
from keeprate.mllm.gprune import GPrune
from keeprate.mllm.greedyprune import GreedyPrune
from keeprate.mllm.mmtok import MMTok
from keeprate.mllm.mustdrop import MustDrop
from keeprate.mllm.prumerge import PruMerge
from keeprate.mllm.pyramiddrop import PyramidDrop
from keeprate.mllm.recoverable import RecoverableCompression
from keeprate.mllm.script import Script
from keeprate.mllm.session import MLLMSession, MLLMTrace
from keeprate.mllm.simignore import Simignore
from keeprate.mllm.sparsevlm import SparseVLM
from keeprate.mllm.star import STAR
from keeprate.mllm.todre import ToDRE
from keeprate.mllm.transprune import TransPrune
from keeprate.mllm.trim import TRIM
from keeprate.mllm.trimmedllama import TrimmedLlama
from keeprate.mllm.tsc import TSC
from keeprate.mllm.visionzip import VisionZip
from keeprate.mllm.vscan import VScan
from keeprate.mllm.vtccls import VTCCLS
from keeprate.mllm.zooprune import ZOOPrune

__all__ = [
    "BTP",
    "DART",
    "GAP",
    "STAR",
    "TRIM",
    "TSC",
    "VTCCLS",
    "AttentionDebiasing",
    "BeforeMethod",
    "Choice",
    "CoreMatching",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FiCoCo",
    "FlowCut",
    "FoPru",
    "GPrune",
    "GreedyPrune",
    "Inside",
    "InsideMethod",
    "Knee",
    "MLLMMethod",
    "MLLMSession",
    "MLLMTrace",
    "MMTok",
    "MustDrop",
    "OracleVisual",
    "Pooling",
    "PruMerge",
    "PyramidDrop",
    "RandomInside",
    "RandomVisual",
    "RecoverableCompression",
    "Script",
    "Simignore",
    "SparseVLM",
    "ToDRE",
    "TransPrune",
    "TrimmedLlama",
    "UniformGrid",
    "VScan",
    "VisionZip",
    "Visual",
    "Wrapper",
    "ZOOPrune",
]
