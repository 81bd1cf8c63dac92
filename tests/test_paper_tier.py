"""The paper tier of 10_vit_pruning by the project's own executor, on a model and images that know nothing of digits."""

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
from PIL import Image
from transformers import DeiTConfig, DeiTForImageClassification, DeiTImageProcessorPil

NOTEBOOK = "10_vit_pruning"
CLASSES = ("crane", "hen", "tench")
SIDE, PATCH, DEPTH = 32, 4, 5


def save_model(folder: Path) -> None:
    """A DeiT as on the hub, but tiny: a distillation token, 64 patches and 5 blocks instead of 196 and 12."""
    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=len(CLASSES),
        initializer_range=0.3,
    )
    DeiTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    DeiTImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def save_images(folder: Path, each: int = 6) -> None:
    """An image folder as the hub's image data sets: split/class/image.png, of any size."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / "validation" / name).mkdir(parents=True)
        for i in range(each):
            coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((40 + number, 48), Image.Resampling.BICUBIC)
            picture.save(folder / "validation" / name / f"{i}.png")


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """The repository's notebook in a folder of its own, with a paper tier that points to local files."""
    for folder in ("notebooks", "data"):
        (tmp_path / folder).mkdir()
    for name in (f"notebooks/{NOTEBOOK}.ipynb", "notebooks/manifest.yaml", "data/papers.yaml"):
        shutil.copy(root / name, tmp_path / name)
    for name in ("claims", "models"):
        (tmp_path / "data" / name).symlink_to(root / "data" / name)
    save_model(tmp_path / "deit")
    save_images(tmp_path / "images")
    tier = f"data/tiers/paper/{NOTEBOOK}.yaml"
    given = yaml.safe_load((root / tier).read_text())
    small = {"model": str(tmp_path / "deit"), "task": str(tmp_path / "images"), "n": 12, "batch_size": 4, "repeats": 1}
    assert set(small) <= set(given), "the paper tier says which model, which images and how many"
    (tmp_path / tier).parent.mkdir(parents=True)
    (tmp_path / tier).write_text(yaml.safe_dump(given | small | {"keeps": given["keeps"][1:3]}))
    return tmp_path


def test_paper_tier_runs_on_any_model_and_images(root: Path, project: Path):
    paths = os.pathsep.join(str(root / source) for source in ("lib", "kernels"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "keeprate.execute", NOTEBOOK, "--tier", "paper", "--out", "runs"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    folder = project / "runs" / NOTEBOOK
    run = folder / json.loads((folder / "paper.json").read_text())["run"]
    results = json.loads((run / "results.json").read_text())
    assert results["tier"] == "paper" and results["parameters"]["model"].endswith("deit")
    claims = [claim["id"] for claim in yaml.safe_load((root / "data/claims/vit.yaml").read_text())]
    assert sorted(claim["id"] for claim in results["claims"]) == sorted(claims)
    assert all(claim["verdict"] for claim in results["claims"])
    assert {"accuracy_and_flops", "tokens_kept", "speed", "claims"} <= set(results["figures"])
    assert "localisation" not in results["figures"], "nobody knows which patches matter here"
    executed = (run / f"{NOTEBOOK}.ipynb").read_text()
    assert "does not know which patches matter" in executed
