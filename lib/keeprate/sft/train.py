"""A plain training loop for many short runs: the Trainer's defaults without the Trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from keeprate.check import number, whole
from keeprate.sft.base import SFTMethod
from keeprate.sft.data import Collator
from keeprate.sft.scores import rows_of


def train(
    model: nn.Module,
    data: Any,
    method: SFTMethod,
    *,
    steps: int,
    batch_size: int = 16,
    lr: float = 1e-3,
    warmup: float = 0.05,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
    groups: tuple[str, ...] = (),
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int = 0,
) -> pd.DataFrame:
    """Train a model in place: AdamW, linear warm-up and decay, clipped gradients, a new order for every epoch.

    With the same batches it follows the transformers Trainer step by step; it neither saves nor resumes.

    Args:
        model: A causal language model; in training mode while it is trained, then as before.
        data: Rows as `Collator` takes them: mappings, or a `datasets.Dataset`.
        method: The objective.
        steps: Optimiser steps.
        batch_size: Sequences of a micro-batch.
        lr: Largest learning rate.
        warmup: Share of the steps in which it is reached.
        accumulate: Micro-batches of a step.
        weight_decay: Of AdamW, on everything but norms and biases.
        clip: Largest norm of the gradient; 0 = not clipped.
        seed: Of the order; what the model itself draws (dropout) comes from torch's generator.
        collator: Makes a batch of rows; a `Collator` that carries all columns when None.
        groups: Names of the token groups that a column `group` numbers from 0.
        evaluate: Called with the model, in evaluation mode and without gradients, after every `every` steps, before the
            first and after the last.
        every: Steps between entries of the result; 0 = only before the first, if there is `evaluate`, and after the
            last.

    Returns:
        One row an entry: step, loss (mean over the steps since the last entry), the statistics of `Session.log`, and
        what `evaluate` returned.

    Raises:
        ValueError: On an empty data set, or a number out of range.
    """
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("accumulate", accumulate, 1)):
        whole(name, value, least)
    whole("every", every, 0)
    number("lr", lr, 0)
    number("warmup", warmup, 0, 1)
    number("clip", clip, 0)
    if not isinstance(model, nn.Module) or not isinstance(method, SFTMethod):
        given = f"{type(model).__name__} and {method if isinstance(method, type) else type(method).__name__}"
        raise ValueError(f"train takes a model and a method of kr.sft, such as kr.sft.DFT(); got {given}")
    if not len(data):
        raise ValueError("a data set needs at least one row; got none")
    rows, mode = rows_of(data), model.training
    collate = Collator(pad=0) if collator is None else collator
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(_decayed(model, weight_decay), lr=lr)
    rise = max(1, round(warmup * steps)) if warmup else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / rise if i < rise else (steps - i) / max(1, steps - rise)
    )
    entries: list[dict[str, float]] = []

    def enter(step: int, losses: list[torch.Tensor]) -> None:
        entry = {"step": step} | ({"loss": float(torch.stack(losses).mean())} if losses else {}) | trace.log()
        if evaluate is not None:
            model.eval()
            with torch.no_grad():
                entry |= evaluate(model)
            model.train()
        entries.append(entry)

    try:
        with method(model, groups=groups) as trace:
            model.train()
            if evaluate is not None:
                enter(0, [])
            losses: list[torch.Tensor] = []
            order = _order(len(rows), batch_size, seed)
            for step in range(1, steps + 1):
                micro = []
                for _ in range(accumulate):
                    epoch, index = next(order)
                    micro.append((epoch, _on(collate([rows[i] for i in index]), device)))
                items = sum((b["labels"][:, 1:] != -100).sum() for _, b in micro)
                total = 0.0
                for epoch, batch in micro:
                    trace.epoch = epoch
                    labels = batch.pop("labels")
                    loss = method(model(**batch), labels, items)
                    loss.backward()
                    total = total + loss.detach()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(total)
                if step == steps or (every and step % every == 0):
                    enter(step, losses)
                    losses = []
    finally:
        model.train(mode)
    return pd.DataFrame(entries)


def _order(count: int, size: int, seed: int):
    """Batches of row numbers without end: (epoch, indices); the last batch of an epoch may be short."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for start in range(0, count, size):
            yield epoch, order[start : start + size].tolist()
        epoch += 1


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices decay, norms and biases do not."""
    every = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in every if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in every if p.dim() <= 1], "weight_decay": 0.0},
    ]
