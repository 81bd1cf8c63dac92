"""LLaVA-PruMerge: let the outliers of class attention say how many tokens stay, and add their neighbours to them."""

from dataclasses import dataclass

import torch

from keeprate.anatomy import Multimodal
from keeprate.budget import Budget
from keeprate.check import whole
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Choice, Visual, best
from keeprate.mllm.scores import quartiles
from keeprate.reduce import gather_tokens, join
from keeprate.score import similarity

OUTLIERS = Budget(threshold=1.5)  # interquartile ranges above the third quartile


@register(kind="merging", needs=("class attention", "keys", "features"))
@dataclass(frozen=True)
class PruMerge(BeforeMethod):
    """Keep the outliers of a = softmax(q_cls k / sqrt(c)) of the last block, as if it had one head of width c.

    The score is (a - Q3) / (Q3 - Q1), with quartiles over the image, so that a threshold of 1.5 is the outlier rule. A
    kept token becomes x_i + sum of a_j x_j over the `neighbours` tokens j, kept ones too, whose keys are nearest to its
    own (cosine), and one extra token is the sum of a_j x_j over those not kept; weights are not normalised. All this
    happens before the projector. The extra token stands where the dropped token of the highest score stood; kept ones
    stay in raster order, where the published code orders them by score. Without a class token: the attention received.

    Args:
        keep: As published the outliers, and the extra token on top. With a share or a number the extra token is one of
            them (none where a single token stays).
        plus: PruMerge+: add tokens at a regular stride. With outliers every s-th token, s = int(int(n / outliers) / 3);
            with a share or a number a quarter is chosen by score, the published proportion, the rest at a stride among
            the others.
        neighbours: Tokens merged into each kept one.

    Source: Shang et al. 2024 (2403.15388) and its code.
    """

    keep: float | int | tuple | Budget = OUTLIERS
    plus: bool = False
    neighbours: int = 32

    def __post_init__(self):
        super().__post_init__()
        whole("neighbours", self.neighbours)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (-1,)

    def score(self, t: Visual) -> torch.Tensor:
        a = t.one_head(-1).float()
        q1, q3 = quartiles(a, t.valid)
        return (a - q3) / (q3 - q1).clamp_min(1e-12)

    def choose(self, t: Visual, scores: torch.Tensor) -> Choice:
        a = t.one_head(-1).float()
        there = torch.ones_like(a, dtype=torch.bool) if t.valid is None else t.valid
        keep = self.selected(t, scores, there)
        gone = there & ~keep
        extra = gone.any(1) if self.budget.ragged else gone.any(1) & (self.count(t, scores) > 1)
        host = best(scores, extra.long(), gone)
        at = torch.where(host.any(1), host.to(torch.uint8).argmax(1), -1)[:, None]
        home = torch.where(keep, torch.arange(t.n, device=a.device), at).masked_fill(~there, -1)
        reduction = join(home, score=t.hide(scores))
        last = host.gather(1, reduction.rep)[..., None]  # i m 1: the extra token
        mix = neighbour_weights(t.keys(-1), a, reduction.rep, self.neighbours, there)
        mix = torch.where(last, (a * gone)[:, None], mix)
        x = t.features.float()
        made = t.project((gather_tokens(x, reduction.rep) * ~last + mix @ x).to(t.features.dtype))
        # an image that keeps everything beside others that do not is left alone
        return Choice(reduction, torch.where(gone.any(1)[:, None, None], made, gather_tokens(t.x, reduction.rep)))

    def selected(self, t: Visual, scores: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """[i, n] tokens that stay, without the extra one."""
        count = self.count(t, scores)
        if self.budget.ragged:
            keep = best(scores, count, t.valid)
            if not self.plus:
                return keep
            step = (t.total // count // 3).clamp_min(1)[:, None]
            return keep | (there & (torch.arange(t.n, device=keep.device) % step == 0))
        count = torch.where(count < t.total, (count - 1).clamp_min(1), count)  # the extra token is one of them
        if not self.plus:
            return best(scores, count, t.valid)
        keep = best(scores, (count // 4).clamp_min(1), t.valid)
        return keep | evenly(there & ~keep, count - keep.sum(1))


def evenly(among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mask of `count` [i] tokens at a regular stride among those of a mask [i, n]."""
    rank, m = among.long().cumsum(1), among.sum(1, keepdim=True).clamp_min(1)
    count = count[:, None]
    return among & (rank * count // m > (rank - 1) * count // m)


def neighbour_weights(
    keys: torch.Tensor, weight: torch.Tensor, rep: torch.Tensor, neighbours: int, there: torch.Tensor
) -> torch.Tensor:
    """The weights of each kept token's nearest others, zero elsewhere.

    Args:
        keys: [i, n, c] compared by cosine.
        weight: [i, n] weight of every token.
        rep: [i, m] kept tokens.
        neighbours: How many of the others count.
        there: [i, n] tokens that exist.

    Returns:
        [i, m, n].
    """
    near = similarity(gather_tokens(keys, rep), keys).masked_fill(~there[:, None], float("-inf"))  # i m n
    near = near.scatter(2, rep[..., None], float("-inf"))
    value, index = near.topk(min(neighbours, near.shape[2]), -1)
    picked = weight[:, None].expand_as(near).gather(2, index).masked_fill(value.isneginf(), 0.0)
    return torch.zeros_like(near, dtype=picked.dtype).scatter(2, index, picked)
