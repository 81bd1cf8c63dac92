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


def _logits(model: nn.Module, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """What the model says of the tokens marked in wanted [n, length], none of them the first: [wanted, vocabulary]."""
    row, place = wanted.nonzero(as_tuple=True)
    return model(ids, attention_mask=mask, use_cache=False).logits[row, place - 1].float()


def _exact(right: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
    """Which answers are right in each of their tokens: float [answers], row by row."""
    row, _ = truth.nonzero(as_tuple=True)
    most = int(answer.max()) + 1
    found = torch.full((len(truth) * most,), 2.0, device=right.device)  # 2: no such answer
    found = found.scatter_reduce(0, row * most + answer[truth], right.float(), "amin")
    return found[found < 2]


def _error(model: nn.Module, logits: Tensor, ids: Tensor, mask: Tensor, answer: Tensor, values: Tensor) -> Tensor:
    """How far the number that greedy decoding writes, digit by digit, lies from the true one: float [answers].

    Args:
        model: the model.
        logits: [digits, vocabulary], of every digit of every answer.
        ids, mask, answer: int64 [n, length].
        values: int64 [vocabulary], see `digits`.
    """
    digit = (answer >= 0) & (values[ids] >= 0)
    other = values < 0
    written = ids.masked_scatter(digit, logits.masked_fill(other, -torch.inf).argmax(-1))
    found = []
    for i in range(int(answer.max()) + 1):
        own = digit & (answer == i)
        tens, ones = (own & (own.cumsum(1) == place) for place in (1, 2))
        again = _logits(model, ids.where(~tens, written), mask, ones)  # the ones follow the tens that it wrote
        guess = 10 * values[written[tens]] + values[again.masked_fill(other, -torch.inf).argmax(-1)]
        found.append(guess - 10 * values[ids[tens]] - values[ids[ones]])
    return torch.stack(found, dim=1).flatten().abs().float()


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: Any, records: Records, batch: int = 64) -> Score:
    """Measure what a model has learned; only tokens to be learned count.

    `arithmetic`, `tools`: share of answers whose every token is the likeliest one, given the true ones before it.
    `numbers`: distance of the number written greedily, digits only, from the true one. `documents` and public
    data: nats a token.

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
        truth = group == 1
        logits, targets = _logits(model, ids, mask, truth), ids[truth]
        loss = functional.cross_entropy(logits, targets, reduction="none")
        nll.append(loss)
        if records.kind not in METRIC or records.kind == "documents":
            each = torch.zeros(truth.shape, device=device).masked_scatter(truth, loss).sum(1) / truth.sum(1)
            values.append(each[truth.any(1)])
        elif records.kind == "numbers":
            known = digits(tokenizer).to(device)
            # a head may have more entries than the tokenizer has tokens
            known = functional.pad(known, (0, max(0, logits.shape[-1] - len(known))), value=-1)
            values.append(_error(model, logits[known[targets] >= 0], ids, mask, answer, known))
        else:
            values.append(_exact(logits.argmax(-1) == targets, answer, truth))
    model.train(training)
    return Score(METRIC.get(records.kind, METRIC["documents"]), torch.cat(values).cpu(), torch.cat(nll).mean().item())
