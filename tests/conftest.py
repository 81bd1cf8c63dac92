"""Shared by all tests: no network, the repository root off sys.path, and a toy project to run notebooks in."""

import json
import os
import shutil
import subprocess
import sys

# Before anything imports a Hugging Face library, which read these once.
os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"), "1"))

import torch

# Before anything imports triton (transformers' models do): without a GPU the kernel tests run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the working directory there, and kernels/ would pass for the package `kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
START = 'from keeprate import run as keeprate_run\n\nrun = keeprate_run.start("{name}", globals())'
PARAMETERS = "keep: float = 0.25  # fraction of tokens kept\nseed: int = 0  # seed of everything random"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An empty project in a temporary folder, which becomes the working directory; the value adds a notebook to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("lib", "kernels")))
    monkeypatch.delenv("KEEPRATE_RUN_DIR", raising=False)
    monkeypatch.delenv("KEEPRATE_TIER", raising=False)
    manifest = tmp_path / "notebooks" / "manifest.yaml"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    for folder in ("claims", "expected", "tiers/default", "tiers/smoke", "tiers/paper"):
        (tmp_path / "data" / folder).mkdir(parents=True)

    def add(name: str, *sources: str, parameters: str = PARAMETERS, start: str = START) -> Path:
        cells = [
            new_markdown_cell(f"# {name}"),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            new_code_cell(start.format(name=name), metadata={"tags": ["imports"]}),
            *(new_code_cell(source) for source in sources),
        ]
        path = manifest.parent / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=cells), path)
        nothing = {"smoke": None, "default": None, "paper": None}
        entry = {"title": name, "family": "toy", "papers": [], "minutes": nothing, "memory_gb": nothing}
        manifest.write_text(yaml.safe_dump(yaml.safe_load(manifest.read_text()) | {name: entry}))
        return path

    return add


@pytest.fixture
def paper_run(root: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Runs the paper tier of a notebook, by the project's own executor, in a folder of its own on local files.

    The value takes the notebook's name, the file of data/claims that holds its claims, and the parameters that differ
    from the tier's. It gives what results.json says and the folder of the run, after checking what holds for every
    notebook: it ran through on the given model, and every claim it answers for has a verdict.
    """

    def run(notebook: str, claims: str, **parameters: Any) -> tuple[dict[str, Any], Path]:
        for folder in ("notebooks", "data"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name in (f"notebooks/{notebook}.ipynb", "notebooks/manifest.yaml", "data/papers.yaml"):
            shutil.copy(root / name, tmp_path / name)
        for name in ("claims", "models", "expected", "parity"):
            (tmp_path / "data" / name).symlink_to(root / "data" / name)
        tier = Path("data/tiers/paper") / f"{notebook}.yaml"
        given = yaml.safe_load((root / tier).read_text())
        assert set(parameters) <= set(given), "the paper tier says which model, which data and how many"
        (tmp_path / tier).parent.mkdir(parents=True)
        (tmp_path / tier).write_text(yaml.safe_dump(given | parameters))
        paths = os.pathsep.join(str(root / source) for source in ("lib", "kernels"))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "keeprate.execute", notebook, "--tier", "paper", "--out", "runs"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        folder = tmp_path / "runs" / notebook
        where = folder / json.loads((folder / "paper.json").read_text())["run"]
        results = json.loads((where / "results.json").read_text())
        assert results["tier"] == "paper" and results["parameters"]["model"] == parameters["model"]
        entries = yaml.safe_load((root / "data/claims" / f"{claims}.yaml").read_text())
        own = [claim["id"] for claim in entries if claim["notebook"] == notebook]
        assert sorted(claim["id"] for claim in results["claims"]) == sorted(own)
        assert all(claim["verdict"] for claim in results["claims"])
        return results, where

    return run


@pytest.fixture
def tiny_llama(root: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Writes a Llama as on the hub, but tiny and untrained, with grouped queries and somebody's tokenizer, to disk."""

    def save(layers: int) -> Path:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(root / "data" / "models" / "llama-docs")
        torch.manual_seed(0)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            **special,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    return save
