"""EAFT (2601.02151) and the 80/20 rule: learn where the model is unsure."""

from dataclasses import dataclass

import torch

from keeprate.check import fraction, number, whole
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("entropy",))
@dataclass(frozen=True)
class EntropyWeight(SFTMethod):
    """w = H^alpha, with H the entropy in nats of the distribution that predicts the token.

    The paper normalises H to [0, 1], and its code divides by 3, about log 20: its weights are a third of these at alpha
    1. AdamW takes the factor out, clipped gradients and plain gradient descent do not; `denominator="weight_sum"` has
    none.

    Args:
        alpha: Exponent; 0 is plain fine-tuning.
        top: H is that of the renormalised `top` most probable entries; None = of the whole vocabulary.
        keep: Share of the micro-batch with the highest H that counts at all; 1 = all of it (EAFT), 0.2 is the rule of
            "Beyond the 80/20 Rule" (2506.01939), there for reinforcement learning.
        denominator: See `SFTMethod`.

    Source: EAFT (2601.02151); its code has alpha 1 and the 20 largest logits.
    """

    alpha: float = 1.0
    top: int | None = 20
    keep: float = 1.0

    def __post_init__(self):
        number("alpha", self.alpha, 0)
        fraction("keep", self.keep)
        if self.top is not None:
            whole("top", self.top, 2)
        super().__post_init__()

    @property
    def stats(self) -> tuple[str, ...]:
        return ("nll",) if self.top else ("nll", "entropy")

    @property
    def largest(self) -> int:
        return self.top or 0

    def weigh(self, t: Tokens) -> torch.Tensor:
        entropy = t.entropy(self.top).clamp_min(0)
        weight = entropy**self.alpha
        return weight if self.keep == 1 else weight * t.top_share(entropy, self.keep, "batch")
