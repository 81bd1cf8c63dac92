"""MSTM: every unimportant token joins the important one it resembles most."""

from dataclasses import dataclass

from keeprate import select
from keeprate.method import register
from keeprate.reduce import Reduction, merge_into
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="merging", needs=("attention rows", "features"), reconstructed=True)
@dataclass(frozen=True)
class MSTM(StagedMethod):
    """The k most attended tokens stay; each other one merges into its nearest by cosine, weighted by its attention.

    Reconstructed from the abstract: the weights are our reading, and the multi-scale half of the paper, which fuses
    coarser patches by a trained layer, is left out because nothing here is trained.

    Source: the abstract of 2306.04897.
    """

    def select(self, t: Tokens, k: int) -> Reduction:
        s = t.importance()
        return merge_into(select.top_k(s, k), t.x, s, score=s)
