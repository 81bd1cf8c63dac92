"""keeprate: which tokens matter, and what becomes of the rest.

`keeprate.score`, `keeprate.select` and `keeprate.reduce` are pure functions on tensors; each family's package
(`keeprate.vit`) composes them into methods and places them in a model.
"""

import importlib
from typing import Any

from keeprate import attention, kv, mllm, reduce, score, select, sft, vit
from keeprate.anatomy import anatomy
from keeprate.attention import listen
from keeprate.budget import Budget
from keeprate.method import Method, method, methods, register
from keeprate.models import load, models
from keeprate.tasks import task
from keeprate.tasks.vqa import vqa
from keeprate.trace import Trace

# imported on first use: they need what a machine that only trains may lack
_LATE = {
    "start": "keeprate.run",
    "measure": None,
    "patterns": None,
    "plot": None,
    "ledger": None,
}

__all__ = [
    "Budget",
    "Method",
    "Trace",
    "anatomy",
    "attention",
    "kv",
    "ledger",
    "listen",
    "load",
    "measure",
    "method",
    "methods",
    "mllm",
    "models",
    "patterns",
    "plot",
    "reduce",
    "register",
    "score",
    "select",
    "sft",
    "start",
    "task",
    "vit",
    "vqa",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'keeprate' has no attribute {name!r}")
    home = _LATE[name]
    return getattr(importlib.import_module(home), name) if home else importlib.import_module(f"keeprate.{name}")
