"""BAT: importance and diversity: similar attentive tokens are matched, the inattentive ones clustered."""

from dataclasses import dataclass

import torch

from keeprate import select
from keeprate.check import fraction, whole
from keeprate.method import register
from keeprate.reduce import Reduction, gather_tokens, merge
from keeprate.vit.base import StagedMethod, Tokens
from keeprate.vit.tome import merge_similar


@register(kind="merging", needs=("attention rows", "features"), reconstructed=True)
@dataclass(frozen=True)
class BAT(StagedMethod):
    """The k most attended tokens lose their d most similar members by pairwise merging; the others become d clusters.

    So k tokens are left: k - d attentive and d from density-peak clusters of the inattentive, all means weighted by
    attention. Reconstructed: how the budget is split, d = diversity * k, is exposed because it is not published as
    code.

    Args:
        diversity: Share of the budget spent on the inattentive tokens.
        neighbours: Nearest tokens that define density.

    Source: Long et al. 2023 (2211.11315); the total of keep * n tokens fits the cost in the authors' logs.
    """

    diversity: float = 0.2
    neighbours: int = 5

    def __post_init__(self):
        super().__post_init__()
        fraction("diversity", self.diversity)
        whole("neighbours", self.neighbours)

    def select(self, t: Tokens, k: int) -> Reduction:
        s = t.importance()
        d = min(max(1, round(self.diversity * k)), t.n - k, k // 2)
        kept = select.top_k(s, k)
        others = select.rest(kept, t.n)
        if d == 0:  # a single token is left
            labels, rep = torch.zeros_like(t.ids), kept
            return merge(labels, s, rep, score=s)
        matched = merge_similar(gather_tokens(t.x, kept), torch.ones_like(kept, dtype=torch.float32), d)
        centres, cluster = select.dpc_knn(gather_tokens(t.x, others), d, self.neighbours)
        labels = torch.zeros_like(t.ids).scatter(1, kept, matched.slot).scatter(1, others, cluster + k - d)
        rep = torch.cat([kept.gather(1, matched.rep), others.gather(1, centres)], 1)
        return merge(labels, s, rep, score=s)
