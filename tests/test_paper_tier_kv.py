"""The paper tiers of the KV-cache notebooks: a Llama and a data set that the project never saw."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def save_model(root: Path, folder: Path) -> None:
    """A Llama as on the hub, but tiny and untrained, with grouped queries and somebody's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "models" / "llama-docs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_rows(path: Path, size: int, n: int = 6) -> None:
    """Questions in the columns of RULER, of different lengths, `size` words or a little more."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(n):
        words = rng.choice(["array", "returns", "value", "the", "of", "index"], size + 5 * number)
        code = str(rng.integers(10_000, 99_999))
        context = " ".join([*words[:30], f"One of the magic numbers is: {code}.", *words[30:]])
        row = {"context": context, "question": "What is the magic number?", "answer_prefix": "It is", "answer": [code]}
        lines.append(json.dumps(row | {"task": "niah_single_1", "max_new_tokens": 16}))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("notebook", "size", "small", "pictures"),
    [
        (
            "30_kv_eviction",
            60,
            {"n": 3, "length": 100, "long": 128, "keeps": [0.2, 0.5]},
            {"accuracy_and_bytes", "error_and_bytes", "recall_and_budget", "kept", "kept_words", "speed", "claims"},
        ),
        (
            "31_kv_decoding",
            120,
            {"n": 4, "length": 256, "keeps": [0.25], "lengths": [128, 192], "new_tokens": 16},
            {"claims"},
        ),
        (
            "32_kv_fewer_bits",
            60,
            {"n": 3, "length": 128, "shares": [0.3, 0.6], "repeats": 1, "dtype": "float32"},
            set(),
        ),
    ],
)
def test_paper_tier_runs_on_any_model_and_data(
    notebook: str, size: int, small: dict, pictures: set, paper_run: Callable, root: Path, tmp_path: Path
):
    save_model(root, tmp_path / "llama")
    save_rows(tmp_path / "rows.jsonl", size)
    local = {"model": str(tmp_path / "llama"), "task": str(tmp_path / "rows.jsonl")}
    results, _ = paper_run(notebook, "kv", **local, **small)
    assert pictures <= set(results["figures"])
