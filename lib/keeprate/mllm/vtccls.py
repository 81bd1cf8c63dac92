"""VTC-CLS: keep what the class token looks at in several blocks of the vision encoder."""

from dataclasses import dataclass

import torch

from keeprate.anatomy import Multimodal
from keeprate.check import whole
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual


@register(kind="pruning", needs=("class attention",))
@dataclass(frozen=True)
class VTCCLS(BeforeMethod):
    """Score a token by its class attention, mean over heads, summed over blocks start..f; f gives the features.

    Without a class token: the attention received, mean over query rows. With start = f this is FasterVLM.

    Args:
        start: 0-based first block of the sum. The paper tunes it for every task and budget; None = the last third of
            the blocks, counted from f, which is our choice.

    Source: Wang et al. 2024 (2412.05819) and its code; other ways to join the blocks (min, max) are left out.
    """

    start: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.start is not None:
            whole("start", self.start, least=0)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        start = self.start
        if start is None:
            start = max(0, parts.feature + 1 - max(1, len(parts.tower_layers) // 3))
        if start > parts.feature:
            raise ValueError(f"start must lie in 0..{parts.feature}, the block that gives the features; got {start}")
        return tuple(range(start, parts.feature + 1))

    def score(self, t: Visual) -> torch.Tensor:
        return torch.stack([t.importance(layer) for layer in self.tower_layers(t.parts)]).sum(0)
