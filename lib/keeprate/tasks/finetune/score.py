"""What a model has learned of a fine-tuning task, measured on rows without noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from keeprate import check
from keeprate.tasks.finetune.records import Records, digits

METRIC = {
    "arithmetic": "exact match",
    "tools": "exact match",
    "numbers": "absolute error",
    "documents": "nats a token",
}
HIGHER_IS_BETTER = {"arithmetic": True, "tools": True, "numbers": False, "documents": False}


@dataclass(frozen=True)
class Score:
    """How well a model has learned a task.

    Attributes:
        metric: what ``values`` are, see `METRIC`.
        values: float [answers] or, for `documents`, [rows].
        nll: mean negative log-likelihood of the tokens to be learned, in nats.
    """

    metric: str
    values: Tensor
    nll: float

    @property
    def value(self) -> float:
        """Mean of ``values``."""
        return self.values.mean().item()

    def __repr__(self) -> str:
        return f"Score({self.metric} {self.value:.4g}, {self.nll:.4g} nats a token, n={len(self.values)})"


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What the model says of every token but the first: [n, length - 1, vocabulary]."""
    return model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()


def _exact(logits: Tensor, ids: Tensor, truth: Tensor, answer: Tensor) -> Tensor:
    """Whether every token of an answer is the likeliest one behind those before it: float [answers]."""
    each = torch.arange(int(answer.max()) + 1, device=ids.device)[:, None, None]
    part = truth & (answer == each)  # answers n length
    right = ((logits.argmax(-1) == ids) | ~part).all(-1)
    return right.T[part.any(-1).T].float()


def _error(model: nn.Module, logits: Tensor, ids: Tensor, mask: Tensor, answer: Tensor, values: Tensor) -> Tensor:
    """How far the number that greedy decoding writes, digit by digit, lies from the true one: float [answers]."""
    chosen = values >= 0
    written = logits.masked_fill(~chosen, -torch.inf).argmax(-1)  # n length-1, a digit's token everywhere
    found = []
    for i in range(int(answer.max()) + 1):
        digit = (answer[:, 1:] == i) & (values[ids[:, 1:]] >= 0)
        tens, ones = (digit & (digit.cumsum(1) == place) for place in (1, 2))
        again = torch.cat([ids[:, :1], ids[:, 1:].where(~tens, written)], dim=1)  # the ones follow the tens it wrote
        second = _logits(model, again, mask).masked_fill(~chosen, -torch.inf).argmax(-1)
        guess = 10 * values[written[tens]] + values[second[ones]]
        found.append(guess - 10 * values[ids[:, 1:][tens]] - values[ids[:, 1:][ones]])
    return torch.stack(found, dim=1).flatten().abs().float()


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: Any, records: Records, batch: int = 64) -> Score:
    """Measure what a model has learned; only tokens to be learned count.

    `arithmetic`, `tools`: share of answers whose every token is the likeliest one, given the true ones before it.
    `numbers`: distance of the number written greedily, digits only, from the true one. `documents`: nats a token.

    Args:
        model: a causal language model of transformers; its mode, train or eval, is as before afterwards.
        tokenizer: the one that the rows were drawn with.
        records: rows, usually of the split "test".
        batch: rows a pass.

    Returns:
        The score.

    Raises:
        ValueError: ``batch`` below 1.
    """
    check.whole("batch", batch)
    training, device = model.training, next(model.parameters()).device
    values, nll = [], []
    model.eval()
    for part in torch.arange(len(records)).split(batch):
        ids, mask, group, answer = (
            x[part].to(device) for x in (records.input_ids, records.attention_mask, records.group, records.answer)
        )
        logits, truth = _logits(model, ids, mask), group[:, 1:] == 1
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(truth)
        nll.append(loss[truth])
        if records.kind == "documents":
            values.append((loss * truth).sum(1) / truth.sum(1))
        elif records.kind == "numbers":
            values.append(_error(model, logits, ids, mask, answer, digits(tokenizer).to(device)))
        else:
            values.append(_exact(logits, ids[:, 1:], truth, answer[:, 1:]))
    model.train(training)
    return Score(METRIC[records.kind], torch.cat(values).cpu(), torch.cat(nll).mean().item())
