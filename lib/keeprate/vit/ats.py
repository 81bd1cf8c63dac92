"""ATS: sample tokens by the inverse of the cumulative score, so that easy images keep fewer."""

from dataclasses import dataclass

from keeprate import score, select
from keeprate.check import whole
from keeprate.method import register
from keeprate.reduce import Reduction, drop
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="pruning", needs=("attention rows", "values"))
@dataclass(frozen=True)
class ATS(StagedMethod):
    """Each of K = int(keep^i n) ordinates of the cumulative score picks the nearest token; fewer survive when it is
    peaked.

    s_j = A[cls, j] ||V_j||, normalised over patches. Only the query rows of sampled tokens are used in the sampling
    layer, which is the same as dropping the others between attention and MLP. Without a class token A[cls, j] is the
    mean attention received.

    The authors' code keeps the number of ordinates at its first value in all of layers 3 to 11; here it follows `keep`
    and `layers`, as in the comparison of Haurum et al. 2023.

    Args:
        minimum: At least this many ordinates.
        per_head: Multiply attention and value norm within each head, then sum (a common re-implementation).
        ascending: Accumulate from the lowest score (the authors' code) instead of raster order.

    Source: Fayyaz et al. 2022 (2111.15667), token scoring and inverse transform sampling.
    """

    minimum: int = 8
    per_head: bool = False
    ascending: bool = True

    def __post_init__(self):
        super().__post_init__()
        whole("minimum", self.minimum)

    def count(self, t: Tokens) -> int:
        return min(t.total, max(super().count(t), self.minimum))

    def reduce(self, t: Tokens) -> Reduction | None:
        # A keep rate of 1 asks for no reduction; every other count may drop tokens, since ordinates can coincide. The
        # count is not capped by t.n, which other samples of a ragged batch may have set.
        return None if self.budget.keep == 1 else self.select(t, self.count(t))

    def select(self, t: Tokens, k: int) -> Reduction:
        norm = score.value_norm(t.attention.v[:, :, t.prefix :], self.per_head)
        heads = t.heads(cls=t.has_cls)
        s = (heads * norm).sum(1) if self.per_head else heads.sum(1) * norm
        if t.valid is not None:
            s = s.masked_fill(~t.valid, 0.0)
        kept = select.inverse_cdf(s, k, self.ascending)
        return drop(kept.index, kept.valid, score=s)
