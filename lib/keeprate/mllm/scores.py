"""Scores of an image's tokens: brought to one range, and how many stand out, where the image itself sets the budget."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate.budget import Budget
from keeprate.check import choice
from keeprate.mllm.base import POSITIONS, BeforeMethod


def unit_range(scores: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Stretch every image's scores to 0..1; all 1 where they are equal, and 0 at padding: [i, n] -> [i, n]."""
    scores = scores.float()
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    low = scores.masked_fill(~there, float("inf")).amin(1, keepdim=True)
    span = scores.masked_fill(~there, float("-inf")).amax(1, keepdim=True) - low
    return torch.where(span > 0, (scores - low) / span.clamp_min(1e-12), 1.0).masked_fill(~there, 0.0)


def quartiles(scores: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """First and third quartile of every image's scores, interpolated as numpy does: [i, n] -> [i, 1], [i, 1]."""
    scores = scores.float() if valid is None else scores.float().masked_fill(~valid, float("nan"))
    low, high = scores.nanquantile(torch.tensor([0.25, 0.75], device=scores.device), dim=1, keepdim=True)
    return low, high


def above_fence(scores: torch.Tensor, valid: torch.Tensor | None = None, reach: float = 1.5) -> torch.Tensor:
    """How many of an image's scores exceed the third quartile by `reach` interquartile ranges: [i, n] -> [i].

    Source: the interquartile rule by which LLaVA-PruMerge and TRIM find their number of tokens.
    """
    low, high = quartiles(scores, valid)
    above = scores.float() > high + reach * (high - low)
    return (above if valid is None else above & valid).sum(1)


def local_outliers(
    scores: torch.Tensor, valid: torch.Tensor | None = None, neighbours: int = 10, threshold: float = 1.5
) -> torch.Tensor:
    """How many scores of an image lie in a sparser place than their neighbours do, by local outlier factor.

    With k-distance the distance to a score's k-th neighbour and reach(i, j) = max(k-distance(j), |s_i - s_j|), density
    is 1 / mean_j reach(i, j) over the k neighbours, and the factor the neighbours' mean density over one's own.

    Args:
        scores: [i, n].
        valid: [i, n] scores that count, anywhere; None = all.
        neighbours: k; an image with fewer scores takes all others.
        threshold: Factor above which a score is an outlier.

    Returns:
        [i] integers.

    Source: Breunig et al. 2000, with the threshold of scikit-learn's "auto".
    """
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    k = min(neighbours, scores.shape[1] - 1)
    if k < 1:
        return torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    # in a sorted line the k nearest stand among the k on either side: no n x n
    line, order = scores.double().masked_fill(~there, float("inf")).sort(1)
    there = there.gather(1, order)
    beside = F.pad(line, (k, k), value=float("inf")).unfold(1, 2 * k + 1, 1)  # i n 2k + 1
    gap = (beside - line[..., None]).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    gap[..., k] = float("inf")  # oneself
    near, index = gap.topk(k, largest=False)  # i n k
    index = (index + torch.arange(line.shape[1], device=line.device)[:, None] - k).clamp(0, line.shape[1] - 1)
    real = near.isfinite()
    many = real.sum(-1).clamp_min(1)
    far = near.masked_fill(~real, 0.0).amax(-1)  # k-distance

    def at_neighbours(x: torch.Tensor) -> torch.Tensor:
        return x.gather(1, index.flatten(1)).view(index.shape).masked_fill(~real, 0.0)

    reach = torch.maximum(at_neighbours(far), near.masked_fill(~real, 0.0))
    density = 1 / (reach.sum(-1) / many + 1e-10)  # scikit-learn's guard against duplicates
    factor = at_neighbours(density).sum(-1) / many / density
    return ((factor > threshold) & there).sum(1)


@dataclass(frozen=True)
class Adaptive(BeforeMethod):
    """A method whose number of tokens comes from the image itself unless `keep` gives it.

    Args:
        keep: Share or number of tokens, those that summarise others included; None = as the image demands.
    """

    keep: float | int | Budget | None = None

    def __post_init__(self):
        if self.keep is not None:
            super().__post_init__()
        elif self.positions is not None:
            choice("positions", self.positions, POSITIONS)

    @property
    def budget(self) -> Budget:
        return Budget(coverage=1.0) if self.keep is None else super().budget  # a count that differs by image
