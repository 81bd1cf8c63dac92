"""PRIOR (2505.08971): caption tokens that can be guessed without the image count less."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("reference losses",))
@dataclass(frozen=True)
class PRIOR(SFTMethod):
    """w = (1 - p_ref)^alpha, with p_ref the probability under a model that was trained on the text alone.

    Args:
        alpha: Exponent; 0 is plain fine-tuning.
        reference: Column with -log p_ref (`kr.sft.score`).
        denominator: See `SFTMethod`; the paper rescales every caption's weights to a mean of 1.

    Source: PRIOR (2505.08971), importance weights of the next-token loss.
    """

    alpha: float = 1.0
    reference: str = "reference"
    denominator: str = field(default="mean_one", kw_only=True)

    columns: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        number("alpha", self.alpha, 0)
        super().__post_init__()

    def weigh(self, t: Tokens) -> torch.Tensor:
        return (-torch.expm1(-t.column(self.reference).clamp_min(0))) ** self.alpha
