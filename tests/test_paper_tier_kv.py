"""The paper tiers of the KV-cache notebooks: a Llama and a data set that the project never saw."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


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
    notebook: str, size: int, small: dict, pictures: set, paper_run: Callable, tiny_llama: Callable, tmp_path: Path
):
    save_rows(tmp_path / "rows.jsonl", size)
    local = {"model": str(tiny_llama(3)), "task": str(tmp_path / "rows.jsonl")}
    results, _ = paper_run(notebook, "kv", **local, **small)
    assert pictures <= set(results["figures"])
