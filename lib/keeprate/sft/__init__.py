"""Token-weighted fine-tuning: which training tokens to learn from. Loss functions for the Trainer people have."""

import importlib
from typing import Any

from keeprate.sft.base import Selector, SFTMethod
from keeprate.sft.baselines import SFT, RandomMask
from keeprate.sft.ct import CT
from keeprate.sft.data import Collator, Labels
from keeprate.sft.dft import DFT
from keeprate.sft.entropy import EntropyWeight
from keeprate.sft.focal import Focal
from keeprate.sft.ntl import NTL
from keeprate.sft.pdl import PDL
from keeprate.sft.prior import PRIOR
from keeprate.sft.profit import ProFit
from keeprate.sft.rft import RFT, shuffled
from keeprate.sft.rho1 import Rho1
from keeprate.sft.scores import Scores, Weighed, frequency, score, weigh
from keeprate.sft.session import Session
from keeprate.sft.sstoken import SsToken
from keeprate.sft.tltraining import TLTraining, key_places
from keeprate.sft.tokencleaning import TokenCleaning, evolve
from keeprate.sft.tokenfilter import TokenFilter
from keeprate.sft.tokens import Tokens
from keeprate.sft.train import train

_LATE = {"Watch": "keeprate.sft.callback"}  # imports the Trainer's module, which takes a second

__all__ = [
    "CT",
    "DFT",
    "NTL",
    "PDL",
    "PRIOR",
    "RFT",
    "SFT",
    "Collator",
    "EntropyWeight",
    "Focal",
    "Labels",
    "ProFit",
    "RandomMask",
    "Rho1",
    "SFTMethod",
    "Scores",
    "Selector",
    "Session",
    "SsToken",
    "TLTraining",
    "TokenCleaning",
    "TokenFilter",
    "Tokens",
    "Watch",
    "Weighed",
    "evolve",
    "frequency",
    "key_places",
    "score",
    "shuffled",
    "train",
    "weigh",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'keeprate.sft' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
