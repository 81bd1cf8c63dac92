"""KeyDiff (2504.15364): keep the keys that point away from the mean key; no attention is read at all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("keys",))
@dataclass(frozen=True)
class KeyDiff(EvictMethod):
    """Score -cos(K[k], mean of the normalised keys), per KV head.

    Args:
        keep: See `EvictMethod`.
        block: While decoding, tokens over the budget before it is cut again, 128 in the paper; 0 = compress after the
            prompt alone.

    Source: KeyDiff (2504.15364), cosine to the mean of the normalised keys.
    """

    block: int = 0

    def __post_init__(self):
        whole("block", self.block, 0)
        super().__post_init__()

    @property
    def when(self) -> str:
        return "decode" if self.block else "prefill"

    def due(self, step: Step) -> torch.Tensor:
        over = step.cache.hot_counts - self.target(step)
        return (over >= self.block).any(1) if self.block and not step.first else super().due(step)

    def score(self, step: Step) -> torch.Tensor:
        keys = F.normalize(step.view.k.float(), dim=-1)
        there = 1.0 if step.valid is None else step.valid[..., None].float()
        anchor = F.normalize((keys * there).sum(2), dim=-1)  # the length of the mean does not change the cosine
        return -torch.einsum("bgnd,bgd->bgn", keys, anchor)
