"""Focal loss (1708.02002) on tokens: what is predicted well already counts less."""

from dataclasses import dataclass

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("probability",))
@dataclass(frozen=True)
class Focal(SFTMethod):
    """w = (1 - p)^gamma, differentiated along with the loss: pushes towards hard tokens, against DFT.

    d (w l) / dl = (1 - p)^gamma + gamma p (1 - p)^(gamma - 1) l

    Args:
        gamma: 0 is plain fine-tuning.
        denominator: See `SFTMethod`; the paper normalises by the number of boxes assigned to objects.

    Source: Focal loss (1708.02002), equation 4, on the classes of a vocabulary.
    """

    gamma: float = 2.0

    def __post_init__(self):
        number("gamma", self.gamma, 0)
        super().__post_init__()

    def weigh(self, t: Tokens) -> torch.Tensor:
        return (-torch.expm1(-t.nll)) ** self.gamma

    def pull(self, t: Tokens) -> torch.Tensor:
        # l / (1 - p) is 1 where p is 1
        nll = t.nll.clamp_min(1e-12)
        return self.gamma * t.prob * self.weigh(t) * nll / -torch.expm1(-nll)
