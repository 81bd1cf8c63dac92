"""KV-cache methods: what to drop after prefill or while decoding, what to read, what to keep in fewer bits."""

from keeprate.kv.a2sf import A2SF
from keeprate.kv.actqkv import ActQKV
from keeprate.kv.adakv import AdaKV
from keeprate.kv.base import EvictMethod, KVMethod, Modifier, ReadMethod, Step
from keeprate.kv.baselines import OracleKV, RandomKV, RandomRead, TopKRead, future_attention
from keeprate.kv.cache import KVLayer
from keeprate.kv.caote import CAOTE
from keeprate.kv.expected_attention import ExpectedAttention
from keeprate.kv.fasa import FASA
from keeprate.kv.h2o import H2O
from keeprate.kv.keydiff import KeyDiff
from keeprate.kv.knorm import KNorm
from keeprate.kv.kvcompose import KVCompose
from keeprate.kv.pod import PoD, layer_similarity
from keeprate.kv.pyramidkv import PyramidKV
from keeprate.kv.quest import Quest
from keeprate.kv.rcstat import RCStat
from keeprate.kv.scissorhands import Scissorhands
from keeprate.kv.sepllm import SepLLM
from keeprate.kv.session import KVTrace
from keeprate.kv.snapkv import SnapKV
from keeprate.kv.streaming import StreamingLLM
from keeprate.kv.tidaldecode import TidalDecode
from keeprate.kv.tokenselect import TokenSelect
from keeprate.kv.tova import TOVA
from keeprate.kv.vatp import VATP
from keeprate.kv.zipcache import ZipCache

__all__ = [
    "A2SF",
    "CAOTE",
    "FASA",
    "H2O",
    "TOVA",
    "VATP",
    "ActQKV",
    "AdaKV",
    "EvictMethod",
    "ExpectedAttention",
    "KNorm",
    "KVCompose",
    "KVLayer",
    "KVMethod",
    "KVTrace",
    "KeyDiff",
    "Modifier",
    "OracleKV",
    "PoD",
    "PyramidKV",
    "Quest",
    "RCStat",
    "RandomKV",
    "RandomRead",
    "ReadMethod",
    "Scissorhands",
    "SepLLM",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "TopKRead",
    "ZipCache",
    "future_attention",
    "layer_similarity",
]
