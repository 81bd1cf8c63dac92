"""The loop of every training script: a curriculum, a run that resumes, a folder published whole or not at all."""

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
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, besides the architecture.

    Attributes:
        stages: the curriculum, dataclasses with an attribute ``steps``.
        seed: of weights and data.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        decay: share of all steps, at the end, over which the rate falls to zero along a cosine.
        weight_decay: of weight matrices.
        ema: decay of the average of the weights that is published.
    """

    stages: tuple[Any, ...]
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

    def stage(self, step: int) -> tuple[Any, float]:
        """Stage of a step, and the share of it that lies behind.

        Args:
            step: 0 .. steps - 1.
        """
        begin = 0
        for stage in self.stages:
            if step < begin + stage.steps:
                break
            begin += stage.steps
        return stage, (step - begin) / stage.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step.

        Args:
            step: 0 .. steps - 1.
        """
        remaining = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, remaining)))

    def setting(self, step: int) -> tuple[Any, ...]:
        """All of the recipe that a step depends on.

        Args:
            step: 0 .. steps - 1.
        """
        return replace(self.stage(step)[0], steps=0), self.rate(step)


class Trainer:
    """A training run whose whole state can be saved and restored; a subclass says what is learned from what.

    Args:
        model: trained in place.
        recipe: the run.
        device: "cpu" or "cuda".
        bf16: whether the forward pass runs under bfloat16 autocast; weights and optimiser stay in float32.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, device: str = "cpu", bf16: bool = False) -> None:
        self.model, self.recipe, self.device, self.bf16 = model.to(device).train(), recipe, device, bf16
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

    def batches(self, start: int) -> Iterable[Sequence[Tensor]]:
        """Training batches from a step on; a step's batch depends on seed and step alone."""
        return (self.batch(step) for step in range(start, self.recipe.steps))

    def batch(self, step: int) -> Sequence[Tensor]:
        """The batch of a step, 0 .. steps - 1."""
        raise NotImplementedError

    def loss(self, *batch: Tensor) -> tuple[Tensor, Sequence[float]]:
        """What a step minimises, and further numbers for the log."""
        raise NotImplementedError

    def describe(self, numbers: Sequence[float]) -> str:
        """A line of the log.

        Args:
            numbers: means of loss and further numbers over the steps since the last line.
        """
        raise NotImplementedError

    def update(self, *batch: Tensor) -> tuple[float, ...]:
        """One optimiser step.

        Args:
            batch: tensors, as ``batches`` gives them.

        Returns:
            Loss and the further numbers of ``loss``, before the step.
        """
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        loss, numbers = self.loss(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        pace = 1 - min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [w.detach() for w in self.named.values()], pace)
        self.step += 1
        result = loss.item(), *numbers
        self.seconds += time.perf_counter() - begin
        return result

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights on the CPU, ready for ``load_state_dict``; tied ones under each of their names."""
        known = {id(weight): self.average[name].cpu() for name, weight in self.named.items()}
        return {name: known[id(w)] for name, w in self.model.named_parameters(remove_duplicate=False)}

    def save(self, path: Path) -> None:
        """Write weights, averages, optimiser state and step to one safetensors file, atomically."""
        state = {f"weight/{name}": weight.detach() for name, weight in self.named.items()}
        state |= {f"average/{name}": weight for name, weight in self.average.items()}
        for name, weight in self.named.items():
            state |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        state = {key: value.cpu().contiguous() for key, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        about = {
            "step": str(self.step),
            "seconds": str(self.seconds),
            "recipe": repr(self.recipe),
            "recipe_json": json.dumps(asdict(self.recipe)),
        }
        save_file(state, part, about)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        """Take up the state that ``save`` wrote. The recipe may have changed, but only in what lies ahead.

        Args:
            path: the file.

        Raises:
            ValueError: the file was written under a recipe that treats a step differently which lies behind.
        """
        with safe_open(path, "pt") as file, torch.no_grad():
            about = file.metadata()
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            if about["recipe"] != repr(self.recipe) and not self._same_past(json.loads(about["recipe_json"])):
                raise ValueError(f"{path} belongs to {about['recipe']}, not {self.recipe}; delete it to start anew")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name = key.split("/", 1)
                value = file.get_tensor(key)
                if kind == "weight":
                    self.named[name].copy_(value)
                elif kind == "average":
                    self.average[name].copy_(value)
                else:
                    self.optimizer.state[self.named[name]][kind] = value.to("cpu" if kind == "step" else self.device)

    def _same_past(self, stored: dict[str, Any]) -> bool:
        """Whether a stored recipe and this one treat every step before ``self.step`` alike."""
        kind = type(self.recipe.stages[0])
        stages = tuple(
            kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in stage.items()})
            for stage in stored["stages"]
        )
        old = replace(self.recipe, **stored | {"stages": stages})
        fixed = ("seed", "weight_decay", "ema")
        return all(getattr(old, name) == getattr(self.recipe, name) for name in fixed) and all(
            old.setting(step) == self.recipe.setting(step) for step in range(self.step)
        )

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
        for batch in self.batches(self.step):
            if self.step >= until:
                break
            shown.append(self.update(*batch))
            if self.step % 50 == 0:
                with warnings.catch_warnings(action="ignore"):  # about numbers that no step of these had
                    means = np.nanmean(shown, axis=0)
                print(
                    f"{datetime.now():%H:%M:%S} step {self.step}/{self.recipe.steps} "
                    f"{self.describe(means)} lr {self.recipe.rate(self.step - 1):.1e} "
                    f"minutes {self.seconds / 60:.1f}",
                    flush=True,
                )
                shown.clear()
            if time.monotonic() - saved > every_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
        self.save(checkpoint)


def proportion(right: int, n: int) -> dict[str, Any]:
    """A share with its uncertainty.

    Args:
        right: successes.
        n: trials.

    Returns:
        value, n, and the 95 % Wilson interval, as fractions.
    """
    p, z = right / n, 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"value": round(p, 4), "n": n, "interval95": [round(middle - half, 4), round(middle + half, 4)]}


def options(name: str) -> argparse.ArgumentParser:
    """The options that every training script has.

    Args:
        name: of the model; its folder is ``data/models/<name>`` unless ``--out`` says otherwise.
    """
    parser = argparse.ArgumentParser(description=f"Train {name}; an interrupted run resumes.")
    parser.add_argument("--out", type=Path, default=Path("data/models") / name, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="folder of the checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--interim", action="store_true", help="publish the checkpoint as it is")
    return parser


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(
    model: nn.Module,
    out: Path,
    recipe: Recipe,
    trainer: Trainer,
    facts: dict[str, Any],
    processor: Callable[[Path], Any],
) -> dict[str, Any]:
    """Write a model folder with its processor and card; the folder appears complete or not at all.

    Args:
        model: a transformers model on the CPU.
        out: folder, replaced if it exists.
        recipe: how it was trained.
        trainer: the run, for its step and time.
        facts: further entries of the card (name, data, accuracy ...).
        processor: called with a folder, writes the files of image processor or tokenizer into it.

    Returns:
        The card.
    """
    import transformers

    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new.chmod(0o755)
        model.save_pretrained(new)
        processor(new)
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
