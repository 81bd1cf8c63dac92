"""Ada-KV (2407.11550): heads that spread their attention get more of the layer's budget than heads that do not."""

from dataclasses import dataclass

import torch

from keeprate.check import number
from keeprate.kv.base import EvictMethod, Modifier, Step
from keeprate.kv.snapkv import SnapKV
from keeprate.method import register
from keeprate.select import pooled_counts


@register(kind="budget")
@dataclass(frozen=True)
class AdaKV(Modifier):
    """Pool the scores of all heads of a layer and let the g * B best decide how many each head keeps.

    Needs scores that are comparable between heads, as attention is. What a head protects is counted first.

    Args:
        keep: See `Modifier`.
        base: Any eviction method; SnapKV when None.
        floor: Share of the even budget that every head is sure of. `rule="floor"` gives each head its own best
            floor * B before the rest is pooled; "blend", the published code's variant, pools first and then mixes:
            (1 - floor) * pooled + floor * B.
        rule: "floor" or "blend".

    Source: Ada-KV (2407.11550), adaptive budgets over the heads of a layer, with the safeguard.
    """

    floor: float = 0.2
    rule: str = "floor"

    def __post_init__(self):
        number("floor", self.floor, 0, 1)
        if self.rule not in ("floor", "blend"):
            raise ValueError(f"rule must be 'floor' or 'blend'; got {self.rule!r}")
        super().__post_init__()
        if self.budget.ragged:
            raise ValueError(f"{self.name} divides a number of tokens; got keep={self.keep!r}")

    @classmethod
    def default(cls) -> EvictMethod:
        return SnapKV()

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        each = self.target(step).expand(-1, step.groups)
        sure = (each * (self.floor if self.rule == "floor" else 0.0)).long()
        pooled = pooled_counts(scores, each.sum(1), sure, self.protect(step), step.valid)
        if self.rule == "floor":
            return pooled
        mixed = (1 - self.floor) * pooled + self.floor * each
        return _round_to(mixed, each.sum(1))


def _round_to(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Round [b, g] so that every row sums to total [b]: the largest remainders go up."""
    low = x.floor()
    short = (total - low.sum(1)).long()[:, None]
    rank = (x - low).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (low + (rank < short)).long()
