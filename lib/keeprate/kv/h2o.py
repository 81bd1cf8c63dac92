"""H2O (2306.14048): heavy hitters, the tokens that have received most attention so far, and the recent ones."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("received attention",))
@dataclass(frozen=True)
class H2O(EvictMethod):
    """Accumulated attention S[k] = sum_q A[q, k] over prompt and decode rows; the last `recent` tokens stay anyway.

    The sum is over the query heads of each KV head. Early tokens are summed over more rows than late ones, the flaw
    that A2SF and ZipCache correct.

    Args:
        keep: See `EvictMethod`.
        recent: Tokens that stay whatever their score; the paper gives half of the budget to them, None does the same.

    Source: H2O (2306.14048), heavy hitters by accumulated attention.
    """

    when = "decode"

    recent: int | None = None

    def __post_init__(self):
        if self.recent is not None:
            whole("recent", self.recent, 0)
        super().__post_init__()

    def protected(self) -> int:
        return self.recent or 0

    def fold(self, step: Step) -> None:
        received = step.by_kv_head(step.received(), "sum")
        step.cache.carry("received").add_(received)

    def score(self, step: Step) -> torch.Tensor:
        return step.cache.carry("received")

    def protect(self, step: Step) -> torch.Tensor:
        if self.recent is not None:
            return step.recent(self.recent)
        return step.index >= step.cache.seen - self.target(step)[..., None] // 2
