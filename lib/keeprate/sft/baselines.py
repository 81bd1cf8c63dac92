"""Baselines of this family: every token the same, and a random share of them."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.method import register
from keeprate.sft.base import Selector, SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="baseline")
@dataclass(frozen=True)
class SFT(SFTMethod):
    """Plain supervised fine-tuning: every target token counts 1, or what a column `weights` says.

    Args:
        denominator: See `SFTMethod`.
    """

    def weigh(self, t: Tokens) -> torch.Tensor:
        return torch.ones_like(t.nll)


@register(kind="baseline")
@dataclass(frozen=True)
class RandomMask(Selector):
    """Train on a random share of each sequence's tokens: what every selector must beat at the same share.

    The draw depends on seed, epoch, sequence and place alone, so it survives an interruption and does not depend on
    how sequences are batched. The epoch is known inside `with method(model)` or with `kr.sft.Watch`; else it is 0, and
    a sequence keeps its tokens in every pass.

    Args:
        keep, scope, denominator: See `Selector`.
        seed: Of the draw.
    """

    seed: int = 0

    def __post_init__(self):
        whole("seed", self.seed, 0)
        super().__post_init__()

    def score(self, t: Tokens) -> torch.Tensor:
        return t.noise(self.seed)
