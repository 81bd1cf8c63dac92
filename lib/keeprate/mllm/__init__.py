"""Visual tokens in multimodal language models: which to keep before and inside the language model."""

from keeprate.mllm.base import BeforeMethod, Choice, Inside, InsideMethod, MLLMMethod, Visual, Wrapper
from keeprate.mllm.baselines import OracleVisual, Pooling, RandomInside, RandomVisual, UniformGrid
from keeprate.mllm.debiasing import AttentionDebiasing
from keeprate.mllm.divprune import DivPrune
from keeprate.mllm.fastervlm import FasterVLM
from keeprate.mllm.fastv import FastV
from keeprate.mllm.gap import GAP
from keeprate.mllm.gprune import GPrune
from keeprate.mllm.greedyprune import GreedyPrune
from keeprate.mllm.mmtok import MMTok
from keeprate.mllm.pyramiddrop import PyramidDrop
from keeprate.mllm.recoverable import RecoverableCompression
from keeprate.mllm.script import Script
from keeprate.mllm.session import MLLMSession, MLLMTrace
from keeprate.mllm.todre import ToDRE
from keeprate.mllm.trim import TRIM
from keeprate.mllm.trimmedllama import TrimmedLlama
from keeprate.mllm.tsc import TSC
from keeprate.mllm.zooprune import ZOOPrune
