"""FastV: after the first layers, keep what the last token of the prompt looks at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, check_layers


@register(kind="pruning", needs=("attention rows",))
@dataclass(frozen=True)
class FastV(InsideMethod):
    """Before layer K, keep the tokens with most attention from the prompt's last token in layer K - 1, mean over heads.

    Args:
        keep: 1 - R of the paper.
        layer: K, 0-based number of the first layer that sees fewer tokens.

    Source: Chen et al. 2024 (2403.06764).
    """

    policy: ClassVar[str] = "keep"

    keep: float | int | tuple = 0.5
    layer: int = 2

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((self.layer,), depth)

    def score(self, t: Inside) -> torch.Tensor:
        return t.from_last().mean(1)
