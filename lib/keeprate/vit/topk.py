"""Attention top-k: keep the tokens the class token looks at, drop the rest."""

from dataclasses import dataclass
from typing import ClassVar

from keeprate import select
from keeprate.method import register
from keeprate.reduce import Reduction, drop
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="pruning", needs=("attention rows",))
@dataclass(frozen=True)
class TopK(StagedMethod):
    """Keep the k_i = int(keep^i n) patches of highest class attention; the mean attention received without a class
    token.

    A budget by coverage or threshold keeps a different number in every sample.

    Source: the Top-K baseline of Haurum et al. 2023 (2308.04657); the plain-drop half of EViT.
    """

    takes_ragged: ClassVar[bool] = True

    def reduce(self, t: Tokens) -> Reduction | None:
        if not self.budget.ragged:
            return super().reduce(t)
        s = t.hide(t.importance())
        kept = select.top_counts(s, self.budget.counts(s))
        return None if kept.index.shape[1] == t.n and kept.valid is None else drop(kept.index, kept.valid, score=s)

    def select(self, t: Tokens, k: int) -> Reduction:
        s = t.importance()
        return drop(select.top_k(s, k), score=s)
