"""Train ``llama-docs-draft``: a small sibling of ``llama-docs`` with its tokenizer, for methods with a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeprate.train import llama_docs, loop
from keeprate.train.llama_docs import Stage

RECIPE = loop.Recipe(
    stages=(
        Stage(1000, length=64, batch=64, mix=(0.3, 0.7, 0.0, 0.0)),
        Stage(1000, length=128, batch=32, mix=(0.1, 0.6, 0.15, 0.15)),
        Stage(500, length=256, batch=16),
        Stage(150, length=1024, batch=4),
    ),
    lr=3e-3,
    warmup=100,
    decay=0.07,
)
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}


def tokenizer() -> Any:
    """The tokenizer of ``llama-docs``, which must have been trained."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path("data/models/llama-docs"))


if __name__ == "__main__":
    llama_docs.main("llama-docs-draft", RECIPE, lambda: llama_docs.build(RECIPE.seed, **SIZES), tokenizer)
