"""The paper tier of 30_kv_eviction by the project's own executor: a Llama and a data set that the project never saw."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

NOTEBOOK = "30_kv_eviction"


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


def save_rows(path: Path, n: int = 6) -> None:
    """Questions in the columns of RULER, of different lengths."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(n):
        words = rng.choice(["array", "returns", "value", "the", "of", "index"], 60 + 5 * number)
        code = str(rng.integers(10_000, 99_999))
        context = " ".join([*words[:30], f"One of the magic numbers is: {code}.", *words[30:]])
        row = {"context": context, "question": "What is the magic number?", "answer_prefix": "It is", "answer": [code]}
        lines.append(json.dumps(row | {"task": "niah_single_1", "max_new_tokens": 16}))
    path.write_text("\n".join(lines))


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """The repository's notebook in a folder of its own, with a paper tier that points to local files."""
    for folder in ("notebooks", "data"):
        (tmp_path / folder).mkdir()
    for name in (f"notebooks/{NOTEBOOK}.ipynb", "notebooks/manifest.yaml", "data/papers.yaml"):
        shutil.copy(root / name, tmp_path / name)
    for name in ("claims", "models"):
        (tmp_path / "data" / name).symlink_to(root / "data" / name)
    save_model(root, tmp_path / "llama")
    save_rows(tmp_path / "rows.jsonl")
    tier = f"data/tiers/paper/{NOTEBOOK}.yaml"
    given = yaml.safe_load((root / tier).read_text())
    small = {"model": str(tmp_path / "llama"), "task": str(tmp_path / "rows.jsonl"), "n": 3, "length": 100, "long": 128}
    assert set(small) <= set(given), "the paper tier says which model, which data and how many"
    (tmp_path / tier).parent.mkdir(parents=True)
    (tmp_path / tier).write_text(yaml.safe_dump(given | small | {"keeps": [0.2, 0.5]}))
    return tmp_path


def test_paper_tier_runs_on_any_model_and_data(root: Path, project: Path):
    paths = os.pathsep.join(str(root / source) for source in ("lib", "kernels"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "keeprate.execute", NOTEBOOK, "--tier", "paper", "--out", "runs"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    folder = project / "runs" / NOTEBOOK
    run = folder / json.loads((folder / "paper.json").read_text())["run"]
    results = json.loads((run / "results.json").read_text())
    assert results["tier"] == "paper" and results["parameters"]["model"].endswith("llama")
    own = [c["id"] for c in yaml.safe_load((root / "data/claims/kv.yaml").read_text()) if c["notebook"] == NOTEBOOK]
    assert sorted(claim["id"] for claim in results["claims"]) == sorted(own)
    assert all(claim["verdict"] for claim in results["claims"])
    pictures = {"accuracy_and_bytes", "error_and_bytes", "recall_and_budget", "kept", "kept_words", "speed", "claims"}
    assert pictures <= set(results["figures"])
