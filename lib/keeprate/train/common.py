"""What the training scripts share: a curriculum, a loop that resumes, a folder published whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from keeprate.tasks import digits

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
class Recipe:
    """Everything that decides a training run, besides the architecture.

    Attributes:
        stages: the curriculum.
        seed: of weights and images.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        decay: share of all steps, at the end, over which the rate falls to zero along a cosine.
        weight_decay: of weight matrices.
        ema: decay of the average of the weights that is published.
    """

    stages: tuple[Stage, ...]
    seed: int = 0
    lr: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.25
    weight_decay: float = 0.05
    ema: float = 0.995

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float, float]:
        """Stage, clutter and learning rate of a step.

        Args:
            step: 0 .. steps - 1.

        Returns:
            The stage, the brightness of its photographs at this step, the learning rate.
        """
        begin = 0
        for stage in self.stages:
            if step < begin + stage.steps:
                break
            begin += stage.steps
        low, high = stage.clutter
        clutter = low + (high - low) * (step - begin) / stage.steps
        remaining = (self.steps - step) / (self.decay * self.steps)
        lr = self.lr * min(1.0, (step + 1) / self.warmup) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, remaining)))
        return stage, clutter, lr


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


class Trainer:
    """A training run whose whole state can be saved and restored.

    Args:
        model: classifier, trained in place.
        forward: see ``Forward``.
        recipe: the run.
        device: "cpu" or "cuda"; bfloat16 autocast on cuda.
    """

    def __init__(self, model: nn.Module, forward: Forward, recipe: Recipe, device: str = "cpu") -> None:
        self.model, self.forward, self.recipe, self.device = model.to(device).train(), forward, recipe, device
        self.named = dict(self.model.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.named.items()}
        matrices = [weight for weight in self.named.values() if weight.ndim == 2]
        others = [weight for weight in self.named.values() if weight.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0

    def update(self, pixels: Tensor, place: Tensor, labels: Tensor) -> tuple[float, float]:
        """One optimiser step.

        Args:
            pixels: uint8 [b, 3, h, w].
            place: [b, n], see ``window``.
            labels: [b].

        Returns:
            Loss and accuracy on the batch, before the step.
        """
        begin = time.perf_counter()
        pixels, place, labels = (tensor.to(self.device, non_blocking=True) for tensor in (pixels, place, labels))
        stage, _, lr = self.recipe.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.forward(self.model, normalised(pixels), place, stage.depth)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        pace = 1 - min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [w.detach() for w in self.named.values()], pace)
        self.step += 1
        result = loss.item(), (logits.argmax(-1) == labels).float().mean().item()
        self.seconds += time.perf_counter() - begin
        return result

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights on the CPU, ready for ``load_state_dict``."""
        return {name: weight.cpu() for name, weight in self.average.items()}

    def save(self, path: Path) -> None:
        """Write weights, averages, optimiser state and step to one safetensors file, atomically."""
        state = {f"weight/{name}": weight.detach() for name, weight in self.named.items()}
        state |= {f"average/{name}": weight for name, weight in self.average.items()}
        for name, weight in self.named.items():
            state |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        state = {key: value.cpu().contiguous() for key, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(state, part, {"step": str(self.step), "seconds": str(self.seconds), "recipe": repr(self.recipe)})
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        """Take up the state that ``save`` wrote.

        Raises:
            ValueError: the file was written under another recipe.
        """
        with safe_open(path, "pt") as file, torch.no_grad():
            about = file.metadata()
            if about["recipe"] != repr(self.recipe):
                raise ValueError(f"{path} belongs to {about['recipe']}, not {self.recipe}; delete it to start anew")
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name = key.split("/", 1)
                value = file.get_tensor(key)
                if kind == "weight":
                    self.named[name].copy_(value)
                elif kind == "average":
                    self.average[name].copy_(value)
                else:
                    self.optimizer.state[self.named[name]][kind] = value.to("cpu" if kind == "step" else self.device)

    def run(self, checkpoint: Path, every_seconds: float = 60.0, until: int | None = None) -> None:
        """Train to the end, or to a step, and write the state from time to time.

        Args:
            checkpoint: file of the state; training resumes from it if it exists.
            every_seconds: time between two writes.
            until: step to stop before, default the last.
        """
        if checkpoint.exists():
            self.restore(checkpoint)
            print(f"resumed at step {self.step}", flush=True)
        until = self.recipe.steps if until is None else until
        saved, shown = time.monotonic(), []
        for batch in batches(self.recipe, self.step):
            if self.step >= until:
                break
            shown.append(self.update(*batch))
            if self.step % 50 == 0:
                stage, clutter, lr = self.recipe.at(self.step - 1)
                loss, accuracy = np.mean(shown, axis=0)
                shown.clear()
                print(
                    f"{datetime.now():%H:%M:%S} step {self.step}/{self.recipe.steps} side {stage.side} "
                    f"clutter {clutter:.2f} lr {lr:.1e} loss {loss:.3f} accuracy {accuracy:.3f} "
                    f"minutes {self.seconds / 60:.1f}",
                    flush=True,
                )
            if time.monotonic() - saved > every_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
        self.save(checkpoint)


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
    p = sum((logits(normalised(pixels)).argmax(-1).cpu() == labels).sum().item() for pixels, labels in parts) / n
    z = 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"value": round(p, 4), "n": n, "interval95": [round(middle - half, 4), round(middle + half, 4)]}


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


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    import transformers

    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new.chmod(0o755)
        model.save_pretrained(new)
        (new / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
        card = facts | {
            "seed": recipe.seed,
            "recipe": asdict(recipe),
            "steps": trainer.step,
            "minutes": round(trainer.seconds / 60, 1),
            "device": f"{trainer.device}, {torch.get_num_threads()} threads, {platform.machine()}",
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "params": sum(weight.numel() for weight in model.parameters()),
            "sha256": {file.name: sha256(file) for file in sorted(new.iterdir())},
        }
        text = json.dumps(card, indent=2)
        (new / "card.json").write_text(text + "\n")
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old / "old")
            os.replace(new, out)
            shutil.rmtree(old)
        else:
            os.replace(new, out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return json.loads(text)


def main(name: str, recipe: Recipe, build: Callable[[], nn.Module], forward: Forward, notes: dict[str, Any]) -> None:
    """The command line of a training script: train or resume, measure, publish.

    Args:
        name: of the model; its folder is ``data/models/<name>`` unless ``--out`` says otherwise.
        recipe: of the run.
        build: returns the model before training.
        forward: see ``Forward``.
        notes: further entries of the card.
    """
    options = argparse.ArgumentParser(description=f"Train {name}; an interrupted run resumes.")
    options.add_argument("--out", type=Path, default=Path("data/models") / name, help="folder of the model")
    options.add_argument("--work", type=Path, default=Path("runs/train"), help="folder of the checkpoint")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--threads", type=int, default=2, help="CPU threads")
    options.add_argument("--interim", action="store_true", help="publish the checkpoint as it is")
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
