"""SnapKV (2404.14469): what the end of the prompt looks at is what the answer will need."""

from dataclasses import dataclass

import torch

from keeprate import score
from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("attention rows",))
@dataclass(frozen=True)
class SnapKV(EvictMethod):
    """Mean attention of the last `window` rows, pooled along the tokens; the window itself stays.

    Query heads are averaged per KV head; the original code keeps a set per query head and repeats keys and values. At
    both ends of the prompt the mean is over the tokens there are; the original code counts zeros beyond them.

    Args:
        keep: See `EvictMethod`; the window counts.
        window: Observation window: query rows that vote, tokens that stay.
        kernel: Width of the pooling, odd.
        pooling: "avg" or "max".

    Source: SnapKV (2404.14469), observation window and clustering by pooling.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self):
        whole("window", self.window)
        score.pool(torch.zeros(1, 1), self.kernel, self.pooling)
        super().__post_init__()

    def protected(self) -> int:
        return self.window

    def protect(self, step: Step) -> torch.Tensor:
        return step.recent(self.window)

    def score(self, step: Step) -> torch.Tensor:
        votes = step.by_kv_head(step.rows(self.window).mean(2))
        before = ~step.recent(self.window)  # the window's own attention must not leak into its neighbours
        valid = before if step.valid is None else before & step.valid
        return score.pool(votes, self.kernel, self.pooling, valid)
