"""RCStat (2506.19549): how far a key's logits rise above those the segment gives itself."""

from dataclasses import dataclass

import torch

from keeprate.check import number, whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register
from keeprate.select import pooled_counts, ragged_heads


@register(kind="eviction", needs=("attention logits",), reconstructed=True)
@dataclass(frozen=True)
class RCStat(EvictMethod):
    """Score E[(u - W)+]: u is a key's raw logit from a row of the last segment, W a logit within that segment.

    U and W count as independent draws, so the score needs the sorted W alone. Each head's scores are measured in its
    own mean, E[RC], and the layer's budget goes to the highest of all heads: heads and inputs with more
    contextualisation keep more. Rebuilt from the abstract and one figure; the adaptive level is our reading.

    Args:
        keep: See `EvictMethod`.
        window: Rows of the last segment; its tokens stay.
        floor: Share of the even budget every head is sure of.

    Source: RCStat (2506.19549), abstract; formula reconstructed.
    """

    window: int = 32
    floor: float = 0.2

    def __post_init__(self):
        whole("window", self.window, 2)
        number("floor", self.floor, 0, 1)
        super().__post_init__()
        if self.budget.ragged:
            raise ValueError(f"{self.name} divides a number of tokens; got keep={self.keep!r}")

    def protected(self) -> int:
        return self.window

    def protect(self, step: Step) -> torch.Tensor:
        return step.recent(self.window)

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        each = self.target(step).expand(-1, step.groups)
        return pooled_counts(scores, each.sum(1), (each * self.floor).long(), self.protect(step), step.valid)

    def score(self, step: Step) -> torch.Tensor:
        logits = step.logits(self.window)  # b h r n
        # the segment's own keys are in every head, for they stay; only their columns are draws of W
        inside = ragged_heads(step.recent(self.window)).index.repeat_interleave(logits.shape[1] // step.groups, 1)
        own = logits.gather(3, inside[:, :, None].expand(-1, -1, logits.shape[2], -1)).flatten(2)
        excess = above(logits.flatten(2), own).view_as(logits).mean(2)
        excess = step.by_kv_head(excess)
        before = ~step.recent(self.window)
        before = before if step.valid is None else before & step.valid
        mean = (excess * before).sum(-1, keepdim=True) / before.sum(-1, keepdim=True).clamp_min(1)
        return excess / mean.clamp_min(1e-12)


def above(u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """E over w of (u - w)+, for every u, without forming pairs.

    Args:
        u: [..., n]; -inf gives 0.
        w: [..., m]; -inf entries are no draws.

    Returns:
        [..., n].
    """
    drawn = w.isfinite()
    ordered = w.masked_fill(~drawn, float("inf")).sort(-1).values.contiguous()
    sums = torch.nn.functional.pad(ordered.masked_fill(ordered.isinf(), 0.0).cumsum(-1), (1, 0))
    u = u.clamp_min(torch.finfo(u.dtype).min)
    below = torch.searchsorted(ordered, u.contiguous())
    total = below * u - sums.gather(-1, below)
    return torch.where(below > 0, total, 0.0).clamp_min(0.0) / drawn.sum(-1, keepdim=True).clamp_min(1)
