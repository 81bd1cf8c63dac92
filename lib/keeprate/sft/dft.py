"""DFT (2508.05629): rescale every token by its own probability, and the gradient is that of the probability."""

from dataclasses import dataclass

import torch

from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("probability",))
@dataclass(frozen=True)
class DFT(SFTMethod):
    """w = p without a gradient, so the gradient of w l is that of 1 - p.

    Args:
        denominator: See `SFTMethod`.

    Source: DFT (2508.05629), the token-level reward rectification.
    """

    def weigh(self, t: Tokens) -> torch.Tensor:
        return t.prob
