"""Rho-1 (2404.07965): train on the tokens that a reference model finds easier than the model does."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.method import register
from keeprate.sft.base import Selector
from keeprate.sft.tokens import Tokens


@register(kind="selection", needs=("reference losses",))
@dataclass(frozen=True)
class Rho1(Selector):
    """Keep the tokens with the highest excess loss, l - l_ref.

    The reference model is one trained on clean text of the wanted kind; `kr.sft.score` computes its losses once for a
    data set.

    Args:
        keep, denominator: See `Selector`. The paper divides by keep times the number of tokens, which differs from
            "kept" by rounding.
        scope: See `Selector`; the paper ranks a batch.
        reference: Column with l_ref.

    Source: Rho-1 (2404.07965), selective language modelling.
    """

    scope: str = "batch"
    reference: str = "reference"

    columns: ClassVar[tuple[str, ...]] = ("reference",)

    def score(self, t: Tokens) -> torch.Tensor:
        return t.nll - t.column(self.reference)
