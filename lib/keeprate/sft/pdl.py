"""PDL (2505.16900): a token counts by a negative power of its frequency."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("token frequencies",))
@dataclass(frozen=True)
class PDL(SFTMethod):
    """w = 1 / (f + eps)^alpha, with f the token's share of all target tokens of the data set (`kr.sft.frequency`).

    The released code takes counts for f; a share gives the same weights up to a factor, which the denominator removes.

    Args:
        alpha: Exponent; 0 is plain fine-tuning.
        eps: Added to the frequency.
        frequency: Column with f.
        denominator: See `SFTMethod`; the paper offers the sum of the weights and nothing at all.

    Source: PDL (2505.16900), weight of a token.
    """

    alpha: float = 1.0
    eps: float = 1e-7
    frequency: str = "frequency"
    denominator: str = field(default="weight_sum", kw_only=True)

    columns: ClassVar[tuple[str, ...]] = ("frequency",)

    def __post_init__(self):
        number("alpha", self.alpha, 0)
        number("eps", self.eps, 0)
        super().__post_init__()

    def weigh(self, t: Tokens) -> torch.Tensor:
        share = t.column(self.frequency).to(t.nll.dtype)
        if (share <= 0).any() or (share > 1).any():
            raise ValueError(f"{self.frequency} must be a share in (0, 1]; got {share.min():g} to {share.max():g}")
        return (share + self.eps) ** -self.alpha
