"""Script: leave out what the rest of the image repeats, then choose by relevance to the question and by diversity."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import choice, number, whole
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, Visual, best, dropped, first
from keeprate.mllm.scores import unit_range
from keeprate.mllm.text import SIGNS, relevance
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("features", "CLIP text"), reconstructed=True)
@dataclass(frozen=True)
class Script(MLLMMethod):
    """Drop the most redundant tokens, and of the others choose greedily the set of greatest determinant.

    Graph-structured pruning: a token's redundancy is d exp(gamma (mu - tau)), with d the number of tokens whose cosine
    with it is at least tau and mu the mean of these cosines; with fewer than K of them it is averaged with the mean of
    all cosines. Query-conditioned pruning: greedy inference of a determinantal point process with kernel
    r_i cos_ij r_j, r the similarity to the question, stretched to 0..1. The paper keeps what both choose. Its code
    intersects two sets of the wanted size and fills up from the second, which always gives the second; so here the
    second stage chooses among what the first left. The paper compares every other token with the rest only, its code
    all with all, as here; its code also keeps the most redundant in the first stage, the paper drops them.

    Args:
        redundant: Share of tokens that the first stage drops, at most down to `keep`.
        tau: Least cosine of an edge.
        K: Edges of a well connected token.
        gamma: Weight of the mean cosine of its edges.
        clip: Name of the CLIP model that the vision encoder comes from, for `kr.load`; the questions are then passed as
            text. "" compares with the language model's embeddings of the words.
        sign: -1 takes the tokens least similar to the question as relevant, as the released code does: OpenAI's CLIP
            maps are inverted. None = -1 with `clip`; 1 without, and with an embedded model, which has no such fault.

    Source: Yang et al. 2025 (2512.01949), with tau, K and gamma of the released code; `redundant` is not given.
    """

    text_guided: ClassVar[bool] = True

    redundant: float = 0.5
    tau: float = 0.2
    K: int = 4
    gamma: float = 1.0
    clip: str = ""
    sign: int | None = None

    def __post_init__(self):
        super().__post_init__()
        number("redundant", self.redundant, 0, 1)
        number("tau", self.tau, -1, 1)
        whole("K", self.K, 0)
        number("gamma", self.gamma)
        choice("sign", self.sign, SIGNS)

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        cosine = score.similarity(t.x)
        cosine.diagonal(dim1=1, dim2=2).round_()  # 1, or 0 for a vector of zeros
        share = (t.total.double() * self.redundant + 1e-6).long()  # fp32 falls short of whole numbers
        gone = torch.minimum(share, t.total - count)
        repeated = best(redundancy(cosine, t.valid, self.tau, self.K, self.gamma), gone, t.valid)
        asked = unit_range(relevance(t, self.clip, self.sign), t.valid)
        weight = asked.clamp_min(1e-4).masked_fill(repeated, 0.0)  # without weight a token fills up, after all others
        order, _ = farthest_point(
            cosine, int(count.max()), objective="dpp", metric="similarity", weight=weight, valid=t.valid
        )
        return dropped(first(order, count, t.n), t.hide(weight))


def redundancy(
    cosine: torch.Tensor, valid: torch.Tensor | None, tau: float, connected: int, gamma: float
) -> torch.Tensor:
    """How much of a token other tokens repeat; padding takes no part.

    Args:
        cosine: [i, n, n] of all tokens with all.
        valid: [i, n] False = padding.
        tau: Least cosine of an edge.
        connected: Edges from which on they alone count.
        gamma: Weight of their mean cosine.

    Returns:
        [i, n].
    """
    there = torch.ones_like(cosine[:, 0]) if valid is None else valid.float()
    edge = (cosine >= tau) * there[:, None]
    degree = edge.sum(-1)
    mean = (cosine * edge).sum(-1) / degree.clamp_min(1)
    by_edges = degree * (gamma * (mean - tau)).exp()
    overall = (cosine * there[:, None]).sum(-1) / there.sum(1, keepdim=True)
    return torch.where(degree >= connected, by_edges, (by_edges + overall) / 2)
