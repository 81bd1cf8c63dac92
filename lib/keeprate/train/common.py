"""What the scripts that train image classifiers share: windows of the grid, rendered batches, card and processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeprate.tasks import digits
from keeprate.train import loop
from keeprate.train.loop import sha256

__all__ = ["Forward", "Recipe", "Stage", "Trainer", "accuracy", "main", "publish", "random_drop", "sha256", "window"]
KEEP, BEFORE_LAYER = 0.3, 4  # the card's random baseline: this share of patches goes on from this layer (from 1)


class Forward(Protocol):
    """Logits of a classifier for images that show a part of its grid."""

    def __call__(
        self,
        model: nn.Module,
        pixels: Tensor,
        place: Tensor,
        depth: int | None = None,
        keep: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run the model.

        Args:
            model: the classifier.
            pixels: [b, 3, h, w], normalised.
            place: [b, n], the grid position of every patch of the image.
            depth: number of blocks that run, evenly spaced; default all.
            keep: (layer, index [b, k]): before this block (from 0) only these patches, and CLS, go on.

        Returns:
            [b, classes].
        """


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        steps: optimiser steps.
        side: side of the window that is rendered and fed, in patches.
        batch: images a step.
        clutter: brightness of the photographs at the start and at the end of the stage, linear in between.
        depth: number of blocks that run.
    """

    steps: int
    side: int
    batch: int
    clutter: tuple[float, float] = (1.0, 1.0)
    depth: int = 12


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    """Everything that decides a training run, besides the architecture; see ``loop.Recipe``."""

    def at(self, step: int) -> tuple[Stage, float, float]:
        """Stage, clutter and learning rate of a step.

        Args:
            step: 0 .. steps - 1.

        Returns:
            The stage, the brightness of its photographs at this step, the learning rate.
        """
        stage, behind = self.stage(step)
        low, high = stage.clutter
        return stage, low + (high - low) * behind, self.rate(step)

    def setting(self, step: int) -> tuple[Any, ...]:
        """All of the recipe that a step depends on; see ``loop.Recipe``."""
        stage, clutter, lr = self.at(step)
        return stage.side, stage.batch, stage.depth, clutter, lr


def normalised(pixels: Tensor) -> Tensor:
    """Pixels as the models' processors give them: mean 0.5 and deviation 0.5.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 in -1..1, same shape.
    """
    return pixels.float() / 127.5 - 1


def window(rng: np.random.Generator, n: int, side: int, grid: int = digits.GRID) -> Tensor:
    """Which patches of the full grid a window covers, one random place an image.

    Args:
        rng: source of chance.
        n: number of images.
        side: side of the window in patches.
        grid: side of the full grid in patches.

    Returns:
        int64 [n, side * side], indices into the grid's patches, in reading order.
    """
    y, x = torch.from_numpy(rng.integers(grid - side + 1, size=(2, n, 1)))
    cell = torch.arange(side * side)
    return (y + cell // side) * grid + x + cell % side


def batches(recipe: Recipe, start: int, ahead: int = 4) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Training batches from a step on, rendered ahead in threads; a step's batch depends on seed and step alone.

    Args:
        recipe: the run.
        start: first step.
        ahead: batches in preparation.

    Yields:
        Pixels uint8 [b, 3, h, w], place [b, n] (see ``window``), labels [b].
    """

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        stage, clutter, _ = recipe.at(step)
        rng = np.random.default_rng([recipe.seed, step])
        drawn = digits.render(rng, stage.batch, "train", stage.side, clutter)
        return drawn.pixels, window(rng, stage.batch, stage.side), drawn.labels

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(make, step) for step in range(start, min(start + ahead, recipe.steps))]
        for step in range(start, recipe.steps):
            yield waiting.pop(0).result()
            if step + ahead < recipe.steps:
                waiting.append(pool.submit(make, step + ahead))


class Trainer(loop.Trainer):
    """A training run on rendered images.

    Args:
        model: classifier, trained in place.
        forward: see ``Forward``.
        recipe: the run.
        device: "cpu" or "cuda"; bfloat16 autocast on cuda.
    """

    def __init__(self, model: nn.Module, forward: Forward, recipe: Recipe, device: str = "cpu") -> None:
        super().__init__(model, recipe, device, bf16=device == "cuda")
        self.forward = forward

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See the function ``batches``."""
        return batches(self.recipe, start)

    def loss(self, pixels: Tensor, place: Tensor, labels: Tensor) -> tuple[Tensor, tuple[float]]:
        """Cross-entropy, and for the log the accuracy on the batch.

        Args:
            pixels: uint8 [b, 3, h, w].
            place: [b, n], see ``window``.
            labels: [b].
        """
        stage, _ = self.recipe.stage(self.step)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = self.forward(self.model, normalised(pixels), place, stage.depth)
        right = (logits.argmax(-1) == labels).float().mean().item()
        return F.cross_entropy(logits.float(), labels), (right,)

    def describe(self, numbers: Sequence[float]) -> str:
        """A line of the log."""
        stage, clutter, _ = self.recipe.at(self.step - 1)
        loss, accuracy = numbers
        return f"side {stage.side} clutter {clutter:.2f} loss {loss:.3f} accuracy {accuracy:.3f}"


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor], n: int = 2048, seed: int = 0, split: str = "test", batch: int = 128
) -> dict[str, Any]:
    """Accuracy on freshly rendered images.

    Args:
        logits: ``logits(pixel_values [b, 3, h, w]) -> [b, classes]``.
        n: number of images.
        seed: of the images.
        split: "train" or "test".
        batch: images a call.

    Returns:
        value, n, and the 95 % Wilson interval, as fractions.
    """
    drawn = digits.render(np.random.default_rng(seed), n, split)
    parts = zip(drawn.pixels.split(batch), drawn.labels.split(batch), strict=True)
    right = sum((logits(normalised(pixels)).argmax(-1).cpu() == labels).sum().item() for pixels, labels in parts)
    return loop.proportion(right, n)


def random_drop(model: nn.Module, forward: Forward, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A function pixels -> logits in which a random 30 % of the patches, and CLS if there is one, go on from layer 4.

    Args:
        model: classifier.
        forward: see ``Forward``.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    n = digits.GRID**2

    def logits(pixels: Tensor) -> Tensor:
        kept = torch.rand(len(pixels), n, generator=generator).argsort(1)[:, : round(KEEP * n)].sort(1).values
        return forward(model, pixels, torch.arange(n).expand(len(pixels), n), keep=(BEFORE_LAYER - 1, kept))

    return logits


DATA = {
    "recipe": "keeprate.tasks.digits: real handwritten digits (scikit-learn) pasted on crops of photographs shipped by "
    "scikit-learn and scikit-image, rendered without end from the seed; trained on eleven writers and one part of each "
    "photograph, measured on three other writers and another part",
    "patch_pixels": digits.PATCH,
    "grid": [digits.GRID, digits.GRID],
    "digit_height_pixels": list(digits.HEIGHT),
    "digit_contrast": list(digits.CONTRAST),
    "ink_share_of_a_true_patch": digits.INK,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": digits.GRID * digits.PATCH, "width": digits.GRID * digits.PATCH},
}


def publish(model: nn.Module, out: Path, recipe: Recipe, trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a model folder with its processor and card; the folder appears complete or not at all.

    Args:
        model: a transformers model on the CPU.
        out: folder, replaced if it exists.
        recipe: how it was trained.
        trainer: the run, for its step and time.
        facts: further entries of the card (name, data, accuracy ...).

    Returns:
        The card.
    """

    def processor(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")

    return loop.publish(model, out, recipe, trainer, facts, processor)


def main(name: str, recipe: Recipe, build: Callable[[], nn.Module], forward: Forward, notes: dict[str, Any]) -> None:
    """The command line of a training script: train or resume, measure, publish.

    Args:
        name: of the model; its folder is ``data/models/<name>`` unless ``--out`` says otherwise.
        recipe: of the run.
        build: returns the model before training.
        forward: see ``Forward``.
        notes: further entries of the card.
    """
    options = loop.options(name)
    given = options.parse_args()

    torch.set_num_threads(given.threads)
    model, checkpoint = build(), given.work / f"{name}.safetensors"
    trainer = Trainer(model, forward, recipe, given.device)
    if given.interim:
        trainer.restore(checkpoint)
    else:
        trainer.run(checkpoint)
    model.load_state_dict(trainer.averaged())
    model.cpu().eval()
    facts = {
        "name": name,
        "task": "vit-digits",
        "status": "final" if trainer.step == recipe.steps else f"interim: step {trainer.step} of {recipe.steps}",
        "train_command": f"python -m keeprate.train.{name.replace('-', '_')} --out data/models/{name}",
        "data": DATA,
        "accuracy": accuracy(lambda pixels: model(pixels).logits),
        "random_drop_accuracy": accuracy(random_drop(model, forward)) | {"keep": KEEP, "before_layer": BEFORE_LAYER},
    }
    card = publish(model, given.out, recipe, trainer, facts | notes)
    if trainer.step == recipe.steps:
        checkpoint.unlink()
    print(json.dumps({key: card[key] for key in ("status", "accuracy", "random_drop_accuracy", "minutes", "params")}))
