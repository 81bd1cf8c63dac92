"""KNorm (2406.11430): keys of small norm receive the attention, so keep those; no attention is read at all."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("keys",))
@dataclass(frozen=True)
class KNorm(EvictMethod):
    """Score -||K[k]||, per KV head, in fp32: in bf16 most scores tie. The rotary embedding leaves it unchanged.

    Args:
        keep: See `EvictMethod`.
        skip: First layers that are left whole; the paper leaves two. They do not count towards the budget.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (2406.11430).
    """

    skip: int = 0

    def __post_init__(self):
        whole("skip", self.skip, 0)
        super().__post_init__()

    def due(self, step: Step) -> torch.Tensor:
        return super().due(step) & (step.layer >= self.skip)

    def score(self, step: Step) -> torch.Tensor:
        return -step.view.k.float().norm(dim=-1)
