"""Shared by all tests: no network, the repository root off sys.path, and a toy project to run notebooks in."""

import os
import sys

# Before anything imports a Hugging Face library, which read these once.
os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"), "1"))

import torch

# Before anything imports triton (transformers' models do): without a GPU the kernel tests run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path

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
