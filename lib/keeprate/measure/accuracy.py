"""Accuracy of a model on a task, with and without a method."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from keeprate.measure.interval import Interval, bootstrap
from keeprate.method import Method
from keeprate.models import Loaded
from keeprate.trace import Trace

if TYPE_CHECKING:
    from keeprate.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """What a model answered on a task.

    Attributes:
        accuracy: Share of right answers, with a bootstrap interval over samples.
        correct: [n] boolean.
        logits: [n, classes] in fp32.
        trace: What the method kept; None for the dense model.
        seconds: Wall clock of the forward passes (a rough number: see `speed` for comparisons).
    """

    accuracy: Interval
    correct: torch.Tensor = field(repr=False)
    logits: torch.Tensor = field(repr=False)
    trace: Trace | None = field(repr=False)
    seconds: float


def evaluate(
    loaded: Loaded,
    task: "Task | Any",
    method: Method | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Run a model over a task.

    Args:
        loaded: Model and processor.
        task: Has `batches(loaded, batch_size)` that yields dicts with pixel_values [b, 3, h, w] and labels [b].
        method: Applied to the model meanwhile; None = the dense model.
        batch_size: Images per forward pass.
        seed: Of the method.
        progress: Show a bar (never under TQDM_DISABLE=1).

    Raises:
        ValueError: If the task is empty or does not suit the model.

    Example:
        >>> evaluate(vit, kr.task("vit-digits"), kr.vit.TopK(keep=0.5)).accuracy   # doctest: +SKIP
    """
    model, logits, labels, seconds = loaded.model, [], [], 0.0
    weight = next(model.parameters())
    with nullcontext() if method is None else method(model, seed=seed) as trace, torch.no_grad():
        # disable=None would also silence a bar that is not on a terminal; False leaves the choice to TQDM_DISABLE
        bar = {"disable": True} if not progress else {}
        total = -(-len(task) // batch_size) if hasattr(task, "__len__") else None
        name = "dense" if method is None else method.name
        for batch in tqdm(task.batches(loaded, batch_size), desc=name, total=total, leave=False, **bar):
            pixels = batch["pixel_values"].to(weight.device, weight.dtype)
            start = time.perf_counter()
            logits.append(model(pixel_values=pixels).logits.float().cpu())
            seconds += time.perf_counter() - start
            labels.append(batch["labels"])
    if not logits:
        raise ValueError(f"task {getattr(task, 'name', task)!r} has no samples")
    logits, labels = torch.cat(logits), torch.cat(labels)
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"the task has labels up to {int(labels.max())}; {loaded.name} knows {logits.shape[1]} classes"
        )
    correct = logits.argmax(-1) == labels
    return Evaluation(bootstrap(correct), correct, logits, trace, seconds)
