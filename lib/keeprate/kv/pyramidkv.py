"""PyramidKV (2406.02069): attention funnels into ever fewer tokens, so low layers get more of the cache."""

from dataclasses import dataclass

import torch

from keeprate.check import number
from keeprate.kv.base import EvictMethod, Modifier, Step
from keeprate.kv.snapkv import SnapKV
from keeprate.method import register


@register(kind="budget")
@dataclass(frozen=True)
class PyramidKV(Modifier):
    """A linear schedule over layers around any score; the layers' mean is the budget.

    With base = B - protected and L layers, the top layer gets base / beta, the bottom one 2 * base - base / beta, and
    each the protected tokens beside that. Where the bottom exceeds the prompt it is clipped and the top raised.

    Args:
        keep: See `Modifier`.
        base: Any eviction method; SnapKV when None, as in the paper.
        beta: Steepness; 1 gives every layer the same.

    Source: PyramidKV (2406.02069), budgets falling linearly with the layer; the published code adds the window as here.
    """

    beta: float = 20.0

    def __post_init__(self):
        number("beta", self.beta, 1)
        super().__post_init__()
        if self.budget.ragged or self.budget.schedule is not None:
            raise ValueError(f"{self.name} makes the schedule over layers itself; got keep={self.keep!r}")

    @classmethod
    def default(cls) -> EvictMethod:
        return SnapKV()

    def target(self, step: Step) -> torch.Tensor:
        each, lengths = super().target(step), step.lengths[:, None]
        held = torch.minimum(each, torch.full_like(each, self.protected()))
        base, room = (each - held).float(), (lengths - held).float()
        low = base / self.beta
        high = 2 * base - low
        over = (high - room).clamp_min(0.0)
        low, high = low + over, high - over
        if step.depth == 1:
            return each
        # layer i gets round(sum up to i) - round(sum up to i - 1): the layers add up to L * base exactly
        at = torch.arange(step.layer + 1, device=each.device)
        share = high - (high - low) * at / (step.depth - 1)
        total = share.cumsum(1)
        ends = (total + 0.5).floor().long()
        own = ends[:, -1:] - (ends[:, -2:-1] if step.layer else 0)
        return torch.minimum((own + held).clamp_min(1), lengths)

    def due(self, step: Step) -> torch.Tensor:
        return EvictMethod.due(self, step)  # by this method's target, not the base's

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        return EvictMethod.counts(self, step, scores)
