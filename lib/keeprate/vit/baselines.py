"""The baselines every table needs: random tokens, and tokens near the centre of the image."""

import math
from dataclasses import dataclass

from keeprate import score, select
from keeprate.check import choice
from keeprate.method import register
from keeprate.reduce import Reduction, drop
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="baseline")
@dataclass(frozen=True)
class Random(StagedMethod):
    """Keep k_i = int(keep^i n) patches chosen uniformly, anew at each reduction and for every sample."""

    def select(self, t: Tokens, k: int) -> Reduction:
        s = score.random(t.ids.shape, t.generator, t.x.device)
        return drop(select.top_k(s, k), score=s)


@register(kind="baseline")
@dataclass(frozen=True)
class Radial(StagedMethod):
    """Keep the k_i = int(keep^i n) patches nearest the centre of the image, the same for every input.

    The study takes the whole ring whose count is nearest the budget; here the count is exact and the last ring is
    filled in raster order.

    Args:
        norm: 1, 2 or inf: the norm that measures distance to the centre.

    Source: fixed radial patterns of Haurum et al. 2023 (2308.04657).
    """

    norm: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        choice("norm", self.norm, (1.0, 2.0, math.inf))

    def select(self, t: Tokens, k: int) -> Reduction:
        s = score.radial(t.grid, self.norm).to(t.x.device)[t.ids]
        return drop(select.top_k(s, k), score=s)
