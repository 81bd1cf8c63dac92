"""The paper tier of 10_vit_pruning by the project's own executor, on a model and images that know nothing of digits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
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


def test_paper_tier_runs_on_any_model_and_images(paper_run: Callable, tmp_path: Path):
    save_model(tmp_path / "deit")
    save_images(tmp_path / "images")
    small = {"model": str(tmp_path / "deit"), "task": str(tmp_path / "images"), "n": 12, "batch_size": 4, "repeats": 1}
    results, run = paper_run(NOTEBOOK, "vit", **small, keeps=[0.5, 0.7])
    assert {"accuracy_and_flops", "tokens_kept", "speed", "claims"} <= set(results["figures"])
    assert "localisation" not in results["figures"], "nobody knows which patches matter here"
    executed = (run / f"{NOTEBOOK}.ipynb").read_text()
    assert "does not know which patches matter" in executed
