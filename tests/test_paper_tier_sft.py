"""The paper tiers of the fine-tuning notebooks: a Llama and an instruction set that the project never saw."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def save_rows(path: Path, columns: tuple[str, str], n: int = 240) -> None:
    """Questions and answers with numbers, under the columns of a public set."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(n):
        a, b = rng.integers(10, 50, 2)
        words = " ".join(rng.choice(["array", "returns", "value", "the", "of", "index"], rng.integers(4, 12)))
        pair = (f"What is {a} plus {b}?", f"The {words} is {a + b}.")
        lines.append(json.dumps(dict(zip(columns, pair, strict=True)) | {"input": ""}))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("notebook", "columns"),
    [("40_sft_token_selection", ("instruction", "output")), ("41_sft_token_weights", ("question", "answer"))],
)
def test_paper_tier_runs_on_any_model_and_data(
    notebook: str, columns: tuple[str, str], paper_run: Callable, tiny_llama: Callable, tmp_path: Path
):
    save_rows(tmp_path / "rows.jsonl", columns)
    local = {"model": str(tiny_llama(2)), "tasks": [str(tmp_path / "rows.jsonl")]}
    results, _ = paper_run(notebook, "sft", **local, seeds=[0, 1], steps=4, rows=160, tested=8)
    assert {"learning_curves", "gain", "auroc", "claims"} <= set(results["figures"])
    assert {row[0] for row in results["figures"]["learning_curves"]["data"]["data"]} == set(local["tasks"])
