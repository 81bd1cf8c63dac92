"""StreamingLLM (2309.17453): attention sinks and a sliding window."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction")
@dataclass(frozen=True)
class StreamingLLM(EvictMethod):
    """Keep the first `sinks` tokens and as many of the last ones as fit, at every step.

    The paper attends with positions inside the cache: `re_position=True`. By default original positions stay.

    Args:
        keep: See `EvictMethod`.
        sinks: First tokens that stay.

    Source: StreamingLLM (2309.17453), rolling cache with attention sinks.
    """

    when = "decode"

    sinks: int = 4

    def __post_init__(self):
        whole("sinks", self.sinks, 0)
        super().__post_init__()

    def protected(self) -> int:
        return self.sinks

    def protect(self, step: Step) -> torch.Tensor:
        return step.sinks(self.sinks)

    def score(self, step: Step) -> torch.Tensor:
        return step.index.float()
