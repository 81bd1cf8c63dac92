"""KV-cache methods: what to drop after prefill or while decoding, what to read, what to keep in fewer bits."""

from keeprate.kv.base import EvictMethod, KVMethod, KVTrace, Modifier, ReadMethod, Step
from keeprate.kv.baselines import OracleKV, RandomKV, future_attention
from keeprate.kv.cache import KVLayer
from keeprate.kv.h2o import H2O
from keeprate.kv.snapkv import SnapKV
from keeprate.kv.streaming import StreamingLLM
from keeprate.kv.tova import TOVA

__all__ = [
    "H2O",
    "TOVA",
    "EvictMethod",
    "KVLayer",
    "KVMethod",
    "KVTrace",
    "Modifier",
    "OracleKV",
    "RandomKV",
    "ReadMethod",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "future_attention",
]
