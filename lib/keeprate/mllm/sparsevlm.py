"""SparseVLM: let the question's visual words rate the tokens, and recycle what they drop."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import Inside, best, dropped
from keeprate.mllm.staged import StagedMethod
from keeprate.reduce import Reduction, gather_tokens, join
from keeprate.select import positions


@register(kind="merging", needs=("attention rows", "features"))
@dataclass(frozen=True)
class SparseVLM(StagedMethod):
    """Keep the tokens with most attention from the raters, mean over heads and raters, in the layer before each cut.

    Raters are chosen once, on the embeddings: with m_t = mean_v softmax_t(V T^T), the question's tokens whose m_t
    exceeds the mean. Of the dropped tokens the share `tau` of highest score is clustered by density peaks into theta
    times as many (plus one) tokens, the means of their members, which stay on top of the budget. Here a recycled token
    stands at its cluster's centre, in published code behind the kept ones.

    Args:
        keep: Shares left by each cut, without recycled tokens; the paper's setting of 192 tokens on average.
        layers: 0-based first layers that see fewer tokens; None = 3, 7 and 16 of 32, scaled to the depth.
        rank: lambda of the paper: drop lambda (n - rank P) tokens instead, P [raters, n] being the attention between
            raters and visual tokens; None = `keep` says how many.
        tau: Share of the dropped tokens that is recycled; 0 = none, as in the authors' second version.
        theta: Clusters for each recycled token.

    Source: Zhang et al. 2024 (2410.04417).
    """

    text_guided: ClassVar[bool] = True
    where: ClassVar[tuple[int, ...]] = (3, 7, 16)

    keep: float | int | tuple = (300 / 576, 200 / 576, 110 / 576)
    rank: float | None = None
    tau: float = 0.3
    theta: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        number("tau", self.tau, 0, 1)
        number("theta", self.theta, 0, 1)
        if self.rank is not None:
            number("rank", self.rank, 0)

    def watched(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def observe(self, t: Inside) -> None:
        rater = raters(t.x, t.text, t.valid, t.text_valid)
        t.carry("rater").scatter_(1, t.text_slot, rater.float())

    def count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        if self.rank is None:
            return super().count(t, scores)
        rater = t.carry("rater") > 0
        index, real = positions(rater)
        p = t.columns(t.attention.rows(index)).mean(1) * real[..., None]  # b r v
        p = p if t.valid is None else p * t.valid[:, None]
        # padding adds rows and columns of zeros: the threshold is that of the matrix without them
        rtol = torch.maximum(rater.sum(1), t.count) * torch.finfo(p.dtype).eps
        spare = t.count - torch.linalg.matrix_rank(p, rtol=rtol)
        return (t.count - (self.rank * spare).long()).clamp_min(1)

    def keeps_all(self, t: Inside) -> bool:
        return self.budget.keep == 1 or super().keeps_all(t)

    def score(self, t: Inside) -> torch.Tensor:
        rater = t.carry("rater")[:, None]
        return t.columns(t.attention.received(rater)).mean(1) / rater.sum(-1)

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        keep = best(scores, self.count(t, scores), t.valid)
        if self.tau == 0:
            return dropped(keep, t.hide(scores))
        return recycle(t.x, t.hide(scores), keep, t.valid, self.tau, self.theta)


def raters(
    visual: torch.Tensor, text: torch.Tensor, valid: torch.Tensor | None, text_valid: torch.Tensor | None
) -> torch.Tensor:
    """Words that many visual tokens point at: embeddings [b, v, d] and [b, t, d] -> bool [b, t]; never none."""
    there = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_valid is None else text_valid
    seen = torch.ones(visual.shape[:2], device=text.device) if valid is None else valid.float()
    logits = visual.float() @ text.float().transpose(1, 2)  # b v t
    share = logits.masked_fill(~there[:, None], float("-inf")).softmax(-1)
    m = (share * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    mean = (m * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    return there & ((m > mean) | (m >= m.amax(1, keepdim=True)))  # all alike: every word is one


def recycle(
    x: torch.Tensor, scores: torch.Tensor, keep: torch.Tensor, valid: torch.Tensor | None, tau: float, theta: float
) -> Reduction:
    """Keep some tokens and the means of clusters of the best others.

    Args:
        x: [b, v, d].
        scores: [b, v].
        keep: [b, v] tokens that stay.
        valid: [b, v] tokens that exist.
        tau, theta: Share of the others that is clustered, clusters for each of them.
    """
    pruned = ~keep if valid is None else ~keep & valid
    gone = pruned.sum(1)
    chosen = best(scores, torch.minimum((tau * gone + 1e-6).long() + 1, gone), pruned)
    size = chosen.sum(1)
    index, there = positions(chosen, 1)
    clusters = torch.minimum((theta * size + 1e-6).long() + 1, size)
    home = index.gather(1, density_peaks(gather_tokens(x, index), clusters, there))
    own = torch.arange(x.shape[1], device=x.device).expand_as(keep)
    stays = own.masked_fill(~keep, -1)
    return join(stays.scatter(1, index, torch.where(there, home, stays.gather(1, index))), score=scores)


def density_peaks(x: torch.Tensor, clusters: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`select.dpc_knn` for samples with numbers of tokens and clusters of their own, as many neighbours as clusters.

    Args:
        x: [b, n, d].
        clusters: [b] at most the tokens there are.
        valid: [b, n] tokens that exist.

    Returns:
        [b, n] position of the centre of each token's cluster; of padding, anything.
    """
    infinite = float("inf")
    gap = score.distance(x).masked_fill(~(valid[:, None] & valid[..., None]), infinite)
    near = gap.sort(-1).values.square().cumsum(-1)
    neighbours = clusters.clamp_min(1)[:, None, None]
    rho = (-near.gather(-1, (neighbours - 1).expand(*gap.shape[:2], 1)) / neighbours).exp()[..., 0] + 1e-6
    rho = rho.masked_fill(~valid, -1.0)
    apart = score.separation(gap, rho)
    apart = torch.where(apart.isinf(), gap.masked_fill(gap.isinf(), 0.0).amax(-1), apart)
    centre = best(rho * apart, clusters, valid)
    label = gap.masked_fill(~centre[:, None], infinite).argmin(-1)
    return torch.where(centre, torch.arange(x.shape[1], device=x.device), label)
