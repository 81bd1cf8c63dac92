"""Select: given a budget, which tokens are kept, or which kept token does every other one join?

Selectors return sorted, unique positions [b, k], or labels [b, n] in 0..k-1. All are batched tensor code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate import score
from keeprate.check import choice, whole
from keeprate_kernels import bipartite_match
from keeprate_kernels import farthest_point as greedy

LINKAGES = ("single", "complete", "average")


def _check_scores(scores: torch.Tensor) -> None:
    if scores.dim() != 2 or scores.shape[0] == 0 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [batch, tokens] and not empty; got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"scores hold NaN in samples {scores.isnan().any(1).nonzero().flatten().tolist()}")


def _check_count(k: int, n: int, name: str = "k") -> None:
    if not 1 <= k <= n:
        raise ValueError(f"{name} must lie in 1..{n}, the number of tokens present; got {k}")


@dataclass(frozen=True)
class Kept:
    """Kept positions of a batch in which samples may keep different numbers.

    Attributes:
        index: [b, k] positions, sorted where valid; padding holds other unique positions of the sample. Selections per
            head (`keep_top`) have one more axis, [b, g, k].
        valid: Same shape, False = padding; None when every sample keeps k.
    """

    index: torch.Tensor
    valid: torch.Tensor | None = None

    def mask(self, n: int) -> torch.Tensor:
        """The selection as a mask [..., n]."""
        real = torch.ones_like(self.index) if self.valid is None else self.valid.to(self.index.dtype)
        return (
            torch.zeros(*self.index.shape[:-1], n, dtype=real.dtype, device=real.device).scatter_add(
                -1, self.index, real
            )
            > 0
        )


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k highest scores, sorted; ties go to the earlier token.

    Args:
        scores: [b, n].
        k: 1..n.

    Returns:
        [b, k] sorted positions.

    Raises:
        ValueError: On NaN, an empty batch, or k outside 1..n.

    Example:
        >>> top_k(torch.tensor([[0.1, 0.9, 0.5]]), 2)
        tensor([[1, 2]])
    """
    _check_scores(scores)
    _check_count(k, scores.shape[1])
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def positions(mask: torch.Tensor, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a mask is True, for rows that may hold any number of it, none too.

    Args:
        mask: [..., n].
        least: Positions a row gets at least.

    Returns:
        (positions [..., k], sorted where real, and which of them are: [..., k]); padding holds other unique positions.
    """
    most = max(least, int(mask.sum(-1).max()) if mask.numel() else 0)
    index = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
    return index, mask.gather(-1, index)


def ragged(keep: torch.Tensor) -> Kept:
    """Positions of a boolean mask [b, n] whose rows may hold different numbers of True, padded to the most."""
    count = keep.sum(1)
    if (count == 0).any():
        raise ValueError(f"every sample must keep a token; samples {(count == 0).nonzero().flatten().tolist()} do not")
    return ragged_heads(keep)


def rest(kept: torch.Tensor, n: int) -> torch.Tensor:
    """Positions that are not kept, sorted: kept [b, k] of n -> [b, n - k]."""
    gone = torch.zeros(len(kept), n, dtype=torch.uint8, device=kept.device).scatter(1, kept, 1)
    return gone.sort(dim=1, stable=True).indices[:, : n - kept.shape[1]]


def top_counts(scores: torch.Tensor, counts: torch.Tensor) -> Kept:
    """Positions of the highest scores with a number of its own for every sample.

    Args:
        scores: [b, n].
        counts: [b] integers in 1..n.
    """
    _check_scores(scores)
    rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return ragged(rank < counts[:, None])


def keep_top(
    scores: torch.Tensor,
    counts: torch.Tensor,
    protect: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> Kept:
    """Per head: what is protected and the highest scores beside it, up to a number for every head.

    Args:
        scores: [b, g, n], higher = keep; ties go to the earlier slot.
        counts: [b, g] how many to keep; a head never keeps more than it holds, nor fewer than it protects.
        protect: Broadcastable to [b, g, n]: slots that stay whatever their score; None = none.
        valid: [b, g, n] slots that hold a token; None = all.

    Returns:
        index [b, g, k] sorted where valid; its padding comes last.

    Raises:
        ValueError: On NaN among the valid scores.
    """
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    ranked = scores.float().masked_fill(~there, float("-inf"))
    if ranked.isnan().any():
        raise ValueError(f"scores hold NaN in samples {ranked.isnan().flatten(1).any(1).nonzero().flatten().tolist()}")
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    counts = torch.minimum(counts, there.sum(-1))
    # 2 = protected, 1 = a token, 0 = nothing there: sorted by that first, by score within
    rank_of = there.to(torch.int8)
    if protect is not None:
        protect = protect.expand_as(there) & there
        rank_of = rank_of + protect.to(torch.int8)
        counts = torch.maximum(counts, protect.sum(-1))
    first = rank_of.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, first)
    most = int(counts.max())
    real = torch.arange(most, device=scores.device) < counts[..., None]
    # slots in order, padding behind them
    chosen = torch.where(real, order[..., :most], scores.shape[-1]).sort(-1).values
    even = bool((counts == most).all())
    return Kept(chosen if even else torch.where(real, chosen, 0), None if even else real)


def ragged_heads(keep: torch.Tensor) -> Kept:
    """As `ragged`, for a mask [..., n] (of heads, or of samples) whose rows may also hold nothing."""
    index, real = positions(keep)
    return Kept(index, None if bool(real.all()) else real)


def pooled_counts(
    scores: torch.Tensor,
    total: torch.Tensor,
    sure: torch.Tensor,
    protect: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divide a layer's budget among its heads: each head's sure part first, the best of all heads for the rest.

    Args:
        scores: [b, g, n], comparable between heads.
        total: [b] tokens of all heads together.
        sure: [b, g] tokens that every head has whatever the others score; they are its best.
        protect: Broadcastable to [b, g, n], slots that stay and count first; None = none.
        valid: [b, g, n] slots that hold a token; None = all.

    Returns:
        [b, g] counts that sum to total, or to all tokens there are, or to what is protected where that is more.

    Source: Ada-KV (2407.11550), adaptive budgets over heads; the sure part is its safeguard.
    """
    b, g, n = scores.shape
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    first = torch.zeros_like(there) if protect is None else protect.expand_as(there) & there
    ranked = scores.float().masked_fill(~there, float("-inf"))
    order = ranked.masked_fill(first, float("inf")).argsort(dim=-1, descending=True, stable=True)
    sure = torch.minimum(torch.maximum(sure, first.sum(-1)), there.sum(-1))
    taken = order.argsort(-1) < sure[..., None]
    left = (total - sure.sum(1)).clamp_min(0)
    pool = ranked.masked_fill(taken, float("-inf")).flatten(1)
    rank = pool.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    won = (rank < left[:, None]) & ~pool.isneginf()
    return sure + won.view(b, g, n).sum(-1)


def threshold(scores: torch.Tensor, theta: float) -> Kept:
    """Positions whose score is at least theta; the best token always stays."""
    _check_scores(scores)
    return ragged((scores >= theta).scatter(1, scores.argmax(1, keepdim=True), True))


def inverse_cdf(scores: torch.Tensor, k: int, ascending: bool = True) -> Kept:
    """Adaptive sampling: k evenly spaced ordinates of the cumulative score each pick the nearest token.

    Peaked scores make several ordinates pick the same token, so at most k are kept, and fewer the more peaked.

    Args:
        scores: [b, n], non-negative; need not be normalised.
        k: Number of ordinates j/k, j = 1..k; may exceed n.
        ascending: Accumulate in ascending order of score (the authors' code) instead of the given order.

    Returns:
        Unique kept positions, at most k per sample.

    Source: ATS (2111.15667), inverse transform sampling; the authors' code also rescales the sum to start
        at 0, which can never pick the least token.
    """
    _check_scores(scores)
    whole("k", k)
    if (scores < 0).any():
        raise ValueError("inverse_cdf needs non-negative scores")
    n = scores.shape[1]
    order = (scores if ascending else torch.zeros_like(scores)).sort(dim=1, stable=True).indices
    mass = scores.float().gather(1, order)
    # tokens without mass (padding) stand before the first ordinate and must not be picked
    cdf = (mass / mass.sum(1, keepdim=True).clamp_min(1e-12)).cumsum(1)
    ordinate = (torch.arange(1, k + 1, device=scores.device) / k).expand(len(scores), k).contiguous()
    # rounding can leave the sum just below the last ordinate: it then belongs to the last token with mass
    last = torch.where(mass > 0, torch.arange(n, device=scores.device), 0).amax(1, keepdim=True)
    right = torch.minimum(torch.searchsorted(cdf.contiguous(), ordinate), last)
    left = (right - 1).clamp_min(0)
    nearer_left = (ordinate - cdf.gather(1, left)).abs() < (cdf.gather(1, right) - ordinate).abs()
    picked = torch.where(nearer_left & (mass.gather(1, left) > 0), left, right)
    return ragged(torch.zeros_like(scores, dtype=torch.bool).scatter(1, order.gather(1, picked), True))


def rank_bins(scores: torch.Tensor, bins: int) -> torch.Tensor:
    """Bin of every token's rank, 0 = best: [b, n] -> [b, n] in 0..bins-1.

    Source: ToP (Li et al. 2023), ranks in bins.
    """
    _check_scores(scores)
    rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return rank * bins // scores.shape[1]


def bipartite(
    metric: torch.Tensor, r: int, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The r best edges from source tokens to their most similar destination.

    Args:
        metric: [b, n, c] features to compare by cosine.
        r: Number of edges, at most the number of sources.
        source: [s] or [b, s] positions that may be merged away.
        destination: [t] or [b, t] positions that may receive, disjoint from the sources.

    Returns:
        (from, to): two [b, r] tensors of positions.

    Source: ToMe (2210.09461), bipartite soft matching.
    """
    b = metric.shape[0]
    best, target = bipartite_match(metric, source, destination)
    source, destination = source.expand(b, -1), destination.expand(b, -1)
    _check_count(r, source.shape[1], "r")
    edge = best.sort(dim=1, descending=True, stable=True).indices[:, :r]
    return source.gather(1, edge), destination.gather(1, target.gather(1, edge))


def nearest(gap: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Label of the nearest centre for every token; a centre always has its own label.

    Args:
        gap: [b, n, n] distances.
        centres: [b, k] positions.

    Returns:
        [b, n] labels in 0..k-1.
    """
    b, n, _ = gap.shape
    labels = gap.gather(2, centres[:, None, :].expand(b, n, -1)).argmin(-1)
    own = torch.arange(centres.shape[1], device=gap.device).expand(b, -1)
    return labels.scatter(1, centres, own)


def dpc_knn(x: torch.Tensor, k: int, neighbours: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Density-peak clustering: centres are dense and far from anything denser.

    Args:
        x: [b, n, d].
        k: Number of clusters.
        neighbours: Neighbours that define density.

    Returns:
        (centres [b, k] sorted positions, labels [b, n]).

    Source: TCFormer (2204.08680).
    """
    _check_count(k, x.shape[1])
    gap = score.distance(x)
    rho = score.density(gap, neighbours)
    centres = top_k(rho * score.separation(gap, rho), k)
    return centres, nearest(gap, centres)


def k_medoids(
    x: torch.Tensor, k: int, weight: torch.Tensor | None = None, iterations: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters around k input tokens, minimising sum_j w_j ||x_j - medoid||.

    Starts at the k heaviest tokens (farthest points when there are no weights). The weight belongs to the token that is
    represented, not to the candidate medoid: only then does the objective never rise.

    Args:
        x: [b, n, d].
        k: Number of clusters.
        weight: [b, n] non-negative importance.
        iterations: Rounds of "nearest medoid, then best medoid of each cluster".

    Returns:
        (medoids [b, k] sorted positions, labels [b, n]).
    """
    b, n, _ = x.shape
    _check_count(k, n)
    gap = score.distance(x)
    medoids = farthest_point(x, k) if weight is None else top_k(weight, k)
    mass = torch.ones(b, n, device=x.device) if weight is None else weight.float()
    for _ in range(iterations):
        labels = nearest(gap, medoids)
        member = torch.zeros(b, n, k, device=x.device).scatter_(2, labels[..., None], mass[..., None])
        cost = (gap @ member).gather(2, labels[..., None]).squeeze(-1)  # b n: token i as medoid of its own cluster
        # ties go to the present medoid, so duplicates cannot make two clusters swap for ever
        cost = cost.scatter(1, medoids, cost.gather(1, medoids) * (1 - 1e-6))
        medoids = _best_of_cluster(cost, labels, k).sort(1).values
    return medoids, nearest(gap, medoids)


def _best_of_cluster(cost: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Position of the least cost in every (non-empty) cluster: cost, labels [b, n] -> [b, k]."""
    order = cost.sort(dim=1, stable=True).indices
    rank = order.argsort(1)
    first = rank.new_full((len(cost), k), cost.shape[1] - 1).scatter_reduce(1, labels, rank, "amin")
    return order.gather(1, first)


def k_means(x: torch.Tensor, k: int, weight: torch.Tensor | None = None, iterations: int = 5) -> torch.Tensor:
    """Weighted Lloyd iterations, started at the k heaviest tokens (farthest points when there are no weights).

    Args:
        x: [b, n, d].
        k: Number of clusters.
        weight: [b, n] non-negative importance.
        iterations: Rounds of "nearest centre, then weighted mean".

    Returns:
        [b, n] labels; every one of the k clusters is non-empty.

    Source: Token Pooling (2110.03860), weighted k-means.
    """
    b, n, d = x.shape
    _check_count(k, n)
    x = x.float()
    mass = torch.ones(b, n, device=x.device) if weight is None else weight.float()
    seeds = farthest_point(x, k) if weight is None else top_k(weight, k)
    centres = x.gather(1, seeds[..., None].expand(-1, -1, d))
    for _ in range(max(1, iterations)):
        gap = torch.cdist(x, centres)
        labels = _fill_empty(gap, gap.argmin(-1), k)
        member = torch.zeros(b, k, n, device=x.device).scatter_(1, labels[:, None, :], mass[:, None, :])
        total = member.sum(-1, keepdim=True)
        centres = torch.where(total > 0, member @ x / total.clamp_min(1e-12), centres)
    return labels


def _fill_empty(gap: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Give every empty cluster the token that fits its own cluster worst; rarely loops at all."""
    while True:
        size = torch.zeros(len(labels), k, device=labels.device, dtype=torch.long)
        size = size.scatter_add(1, labels, torch.ones_like(labels))
        lacking = (size == 0).any(1)
        if not lacking.any():
            return labels
        misfit = gap.gather(2, labels[..., None]).squeeze(-1).masked_fill(size.gather(1, labels) == 1, -1.0)
        moved = labels.scatter(1, misfit.argmax(1, keepdim=True), size.argmin(1, keepdim=True))
        labels = torch.where(lacking[:, None], moved, labels)


def farthest_point(x: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min selection: each new token is the one farthest from those chosen; starts nearest the mean.

    Args:
        x: [b, n, d].
        k: 1..n.

    Returns:
        [b, k] sorted positions.
    """
    _check_count(k, x.shape[1])
    return greedy(x, k, metric="euclidean", start="mean")[0].sort(1).values


def agglomerative(gap: torch.Tensor, k: int, linkage: str = "average") -> torch.Tensor:
    """Bottom-up hierarchical clustering of a whole batch, cut at k clusters; equals scipy's cut of the same linkage.

    Every round merges all pairs of clusters that are each other's nearest at once. For single, complete and average
    linkage these merges belong to the one dendrogram whatever their order, so a few rounds of matrix operations build
    it, and the n - k lowest merges are the cut.

    Args:
        gap: [b, n, n] symmetric distances.
        k: Number of clusters, 1..n.
        linkage: "single", "complete" or "average".

    Returns:
        [b, n] labels in 0..k-1, numbered by first member.

    Raises:
        ValueError: On an unknown linkage or k outside 1..n.

    Source: ATC (2409.11923); the rounds of reciprocal nearest neighbours are ours.
    """
    choice("linkage", linkage, LINKAGES)
    b, n, _ = gap.shape
    _check_count(k, n)
    index = torch.arange(n, device=gap.device).expand(b, n)
    parent = index.clone()  # token whose cluster absorbed this token's cluster, itself while that has not happened
    height = gap.new_full((b, n), float("inf"))
    # the clusters that still exist, packed to the front: first token, size, and distances (average: sums of distances)
    leader, size, alive, total = index, gap.new_ones(b, n), torch.ones_like(index, dtype=torch.bool), gap
    while total.shape[1] > 1:
        c = total.shape[1]
        between = total / (size[:, :, None] * size[:, None, :]) if linkage == "average" else total
        dead = ~(alive[:, :, None] & alive[:, None, :]) | torch.eye(c, dtype=torch.bool, device=gap.device)
        near, who = between.masked_fill(dead, float("inf")).min(-1)
        # no later merge is lower than the nearest pair now: done once n - k merges lie below it
        if bool(((height < near.amin(1, keepdim=True)).sum(1) >= n - k).all()):
            break
        mutual = alive & (who.gather(1, who) == index[:, :c]) & near.isfinite()
        absorbed = mutual & (who < index[:, :c])  # the later cluster of each pair disappears into the earlier one
        gone = torch.where(absorbed, leader, n)  # column n of the padded tensors is a bin
        parent = F.pad(parent, (0, 1)).scatter(1, gone, leader.gather(1, who))[:, :n]
        height = F.pad(height, (0, 1)).scatter(1, gone, near)[:, :n]
        kept = ragged(alive & ~absorbed)
        twin = torch.where(mutual, who, index[:, :c]).gather(1, kept.index)
        total = _join_rows(_join_rows(total, kept.index, twin, linkage), kept.index, twin, linkage)
        partner = size.gather(1, twin).masked_fill(twin == kept.index, 0.0)
        size, leader = size.gather(1, kept.index) + partner, leader.gather(1, kept.index)
        alive = torch.ones_like(leader, dtype=torch.bool) if kept.valid is None else kept.valid
    # cut: a slot whose merge is among the n - k lowest follows its parent
    merged = height.sort(dim=1, stable=True).indices.argsort(1) < n - k
    root = torch.where(merged, parent, index)
    for _ in range(max(1, n.bit_length())):
        root = root.gather(1, root)
    return relabel(root)


def _join_rows(total: torch.Tensor, kept: torch.Tensor, twin: torch.Tensor, linkage: str) -> torch.Tensor:
    """Rows `kept` of total [b, c, w], each combined with its row `twin` (itself = nothing to combine), transposed."""
    b, c, w = total.shape
    base = torch.arange(b, device=total.device)[:, None] * c
    flat = total.reshape(b * c, w)
    one, other = (flat.index_select(0, (base + i).flatten()).view(b, -1, w) for i in (kept, twin))
    if linkage == "average":
        joined = one + other * (twin != kept)[..., None]
    else:
        joined = torch.minimum(one, other) if linkage == "single" else torch.maximum(one, other)
    return joined.transpose(1, 2).contiguous()


def relabel(labels: torch.Tensor) -> torch.Tensor:
    """Number clusters by their first member: any [b, n] integers in 0..n-1 -> 0..k-1 in order of appearance."""
    b, n = labels.shape
    index = torch.arange(n, device=labels.device).expand(b, n)
    first = torch.full_like(labels, n).scatter_reduce(1, labels, index, "amin")  # by label: its first member
    leader = first.gather(1, labels) == index
    return (leader.long().cumsum(1) - 1).gather(1, first.gather(1, labels))
