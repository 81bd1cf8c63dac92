"""ProFit (2601.09195): mask the tokens that the model finds improbable."""

from dataclasses import dataclass

import torch

from keeprate.check import choice, number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="selection", needs=("probability",))
@dataclass(frozen=True)
class ProFit(SFTMethod):
    """Train on tokens of probability p >= tau: the hard version of DFT.

    Args:
        tau: Threshold; 0 is plain fine-tuning.
        mode: "higher" (the method), or its ablations: "lower", p <= tau; "middle", tau <= p <= upper.
        upper: For "middle".
        denominator: See `SFTMethod`; the paper's code divides by all target tokens where gradients are accumulated, and
            by the kept ones where they are not.

    Source: ProFit (2601.09195), probability-guided token selection.
    """

    tau: float = 0.1
    mode: str = "higher"
    upper: float = 1.0

    def __post_init__(self):
        number("tau", self.tau, 0, 1)
        number("upper", self.upper, self.tau, 1)
        choice("mode", self.mode, ("higher", "lower", "middle"))
        super().__post_init__()

    def score(self, t: Tokens) -> torch.Tensor:
        return -t.prob if self.mode == "lower" else t.prob

    def weigh(self, t: Tokens) -> torch.Tensor:
        if self.mode == "lower":
            kept = t.prob <= self.tau
        else:
            kept = (t.prob >= self.tau) & (t.prob <= (self.upper if self.mode == "middle" else 1.0))
        return kept.to(t.nll.dtype)
