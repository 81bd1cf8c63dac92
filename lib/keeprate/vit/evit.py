"""EViT: keep what the class token looks at and fuse the rest into one token."""

import math
from dataclasses import dataclass

from keeprate import select
from keeprate.method import register
from keeprate.reduce import Reduction, drop, fuse_rest
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="fusing", needs=("attention rows",))
@dataclass(frozen=True)
class EViT(StagedMethod):
    """Keep the k = ceil(keep n) most attended of the n tokens present, and append z = sum over the rest of s_i x_i.

    The weights s_i (class attention) are not renormalised. The fused token is an ordinary token from then on: a later
    reduction may drop it. Without a class token, s is the mean attention received.

    Args:
        fuse: Append the fused token; False is plain dropping.

    Source: Liang et al. 2022 (2202.07800).
    """

    fuse: bool = True

    def count(self, t: Tokens) -> int:
        keep = self.budget.keep
        return super().count(t) if keep is None else math.ceil(keep * t.n - 1e-9)

    def select(self, t: Tokens, k: int) -> Reduction:
        s = t.importance()
        kept = select.top_k(s, k)
        return fuse_rest(kept, s, score=s) if self.fuse else drop(kept, score=s)
