"""Visual tokens in multimodal language models: which to keep before and inside the language model."""

from keeprate.mllm.base import BeforeMethod, Choice, Inside, InsideMethod, MLLMMethod, Visual, Wrapper
from keeprate.mllm.baselines import OracleVisual, Pooling, RandomInside, RandomVisual, UniformGrid
from keeprate.mllm.debiasing import AttentionDebiasing
from keeprate.mllm.divprune import DivPrune
from keeprate.mllm.fastervlm import FasterVLM
from keeprate.mllm.fastv import FastV
from keeprate.mllm.gap import GAP
from keeprate.mllm.pyramiddrop import PyramidDrop
from keeprate.mllm.session import MLLMSession, MLLMTrace
from keeprate.mllm.trimmedllama import TrimmedLlama
