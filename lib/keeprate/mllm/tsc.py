"""Token sequence compression: one token for every cluster of alike tokens."""

from dataclasses import dataclass

import torch

from keeprate.check import choice, whole
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, Visual, dropped
from keeprate.reduce import Reduction, gather_tokens, join
from keeprate_kernels import farthest_point


@register(kind="merging", needs=("features",), reconstructed=True)
@dataclass(frozen=True)
class TSC(MLLMMethod):
    """Cluster the projected tokens by k-means; the mean of a cluster replaces its members.

    k-means++ draws its seeds, far ones more likely; here the farthest token is taken each time, so that an image's
    clusters do not depend on chance or on its batch. A cluster stands at its member nearest the mean.

    Args:
        keep: Clusters; the paper uses 0.11, 0.22 and 0.33 of the tokens.
        aggregate: "mean", or "nearest": the member nearest the mean stays as it is.
        iterations: Rounds of nearest centre, then mean, at most.

    Source: Omri et al. 2025 (2504.17892), cluster and aggregate.
    """

    keep: float | int = 0.11
    aggregate: str = "mean"
    iterations: int = 10

    def __post_init__(self):
        super().__post_init__()
        choice("aggregate", self.aggregate, ("mean", "nearest"))
        whole("iterations", self.iterations)

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        home = clusters(t.x, count, t.valid, self.iterations)
        if self.aggregate == "mean":
            return join(home)
        return dropped(home == torch.arange(t.n, device=t.x.device))


@torch.no_grad()
def clusters(x: torch.Tensor, count: torch.Tensor, valid: torch.Tensor | None, iterations: int) -> torch.Tensor:
    """k-means with a number of clusters of its own for every image.

    Args:
        x: [i, n, d].
        count: [i] clusters; none will be empty.
        valid: [i, n] False = padding.
        iterations: Rounds, at most.

    Returns:
        [i, n] position of the member nearest the mean of each token's cluster, -1 = padding.
    """
    (i, n, _), k = x.shape, int(count.max())
    x = x.float()
    there = torch.ones(i, n, dtype=torch.bool, device=x.device) if valid is None else valid
    centres = gather_tokens(x, farthest_point(x, k, metric="euclidean", valid=valid)[0])
    absent = torch.arange(k, device=x.device) >= count[:, None]  # i k
    labels = None
    # squares and products lose half of the digits, and with them which centre is nearer: so fp64
    exact = x.double()
    square = exact.square().sum(-1)[:, None]
    for _ in range(iterations):
        c = centres.double()
        own = c.square().sum(-1).masked_fill(absent, float("inf"))[..., None]
        gap = torch.baddbmm(square + own, c, exact.mT, alpha=-2)  # i k n, squared distances
        before, labels = labels, _fill_empty(gap, gap.min(1).indices, absent, there)
        member = torch.zeros(i, k, n, device=x.device).scatter(1, labels[:, None], there[:, None].float())
        centres = member @ x / member.sum(-1, keepdim=True).clamp_min(1)
        if before is not None and torch.equal(before, labels):
            break
    # of every cluster, the first of the members nearest the mean: two alone are equally near, up to rounding
    misfit = torch.linalg.vector_norm(x - gather_tokens(centres, labels), dim=-1).masked_fill(~there, float("inf"))
    least = misfit.new_full((i, k), float("inf")).scatter_reduce(1, labels, misfit, "amin")
    index = torch.arange(n, device=x.device).expand(i, n)
    nearest = index.masked_fill((misfit > least.gather(1, labels) * (1 + 1e-3)) | ~there, n)
    found = torch.full((i, k), n, device=x.device).scatter_reduce(1, labels, nearest, "amin")
    return found.gather(1, labels).masked_fill(~there, -1)


def _fill_empty(gap: torch.Tensor, labels: torch.Tensor, absent: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Give every empty cluster the token that fits its own worst; rarely loops at all."""
    while True:
        size = torch.zeros(absent.shape, device=gap.device).scatter_add(1, labels, there.float())
        empty = (size == 0) & ~absent
        lacking = empty.any(1, keepdim=True)
        if not bool(lacking.any()):
            return labels
        misfit = gap.gather(1, labels[:, None])[:, 0].masked_fill((size.gather(1, labels) < 2) | ~there, -1.0)
        worst = misfit.argmax(1, keepdim=True)
        goes = torch.where(lacking, empty.to(torch.uint8).argmax(1, keepdim=True), labels.gather(1, worst))
        labels = labels.scatter(1, worst, goes)
