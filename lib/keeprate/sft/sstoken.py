"""ssToken (2510.18250): what the model has learned since its past self, and what looks at the prompt."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.check import choice, number
from keeprate.method import register
from keeprate.sft.base import Selector
from keeprate.sft.tokens import Tokens

ROUNDING = 1e-4  # nats


@register(kind="selection", needs=("history losses", "attention rows"))
@dataclass(frozen=True)
class SsToken(Selector):
    """Keep the highest gamma * norm(l_hist - l) + (1 - gamma) * a.

    norm rescales to [0, 1] within the sequence; a is the share of attention that goes to the prompt in the last layer,
    mean over heads. The number of kept tokens is rounded up. The released code reads a from the token's own row, one
    behind the row that predicts it, and uses a alone for its first 10,000 samples; here a comes from the predicting
    row, and there is no warm-up. Before the first update l_hist - l is rounding, which norm must not blow up: a
    sequence in which it varies by less than 1e-4 nats gets 0.

    Args:
        keep, scope, denominator: See `Selector`.
        gamma: Part of the loss difference; 1 = nothing but that, and no attention is read.
        history: Column with l_hist, the losses of the model before training (`kr.sft.score`).
        reader: Whose attention counts: "predicting" row, or the token's "own".

    Source: ssToken (2510.18250), retrospective excess loss and attention-based score.
    """

    gamma: float = 0.5
    history: str = "history"
    reader: str = "predicting"

    columns: ClassVar[tuple[str, ...]] = ("history",)

    def __post_init__(self):
        number("gamma", self.gamma, 0, 1)
        choice("reader", self.reader, ("predicting", "own"))
        super().__post_init__()

    @property
    def needed(self) -> tuple[str, ...]:
        return super().needed if self.gamma > 0 else ()

    @property
    def reads_attention(self) -> bool:
        return self.gamma < 1

    def score(self, t: Tokens) -> torch.Tensor:
        found = torch.zeros_like(t.nll)
        if self.gamma > 0:
            found = self.gamma * t.min_max(t.column(self.history) - t.nll, ROUNDING)
        if self.gamma < 1:
            found = found + (1 - self.gamma) * t.prompt_attention(self.reader).to(t.nll.dtype)
        return found

    def weigh(self, t: Tokens) -> torch.Tensor:
        return t.top_share(self.score(t), self.keep, self.scope, up=True).to(t.nll.dtype)
