"""Statistics and ranks of tokens within groups (a sequence, a batch): flat [t] values with [t] group numbers."""

import torch


def totals(x: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of x [t] in each of `count` groups, [count]; group [t] in 0..count-1."""
    return x.new_zeros(count).index_add_(0, group, x)


def sizes(group: torch.Tensor, count: int) -> torch.Tensor:
    """Number of tokens in each of `count` groups, [count] int64."""
    return totals(torch.ones_like(group), group, count)


def rank(score: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Place of every token among those of its group by descending score; ties go to the earlier token.

    Args:
        score: [t].
        group: [t] in 0..count-1.
        count: Number of groups.

    Returns:
        [t] int64, 0 = best.

    Raises:
        ValueError: On NaN.
    """
    if score.isnan().any():
        raise ValueError(f"scores hold NaN for {int(score.isnan().sum())} of {len(score)} tokens")
    order = score.sort(descending=True, stable=True).indices
    order = order[group[order].sort(stable=True).indices]
    start = sizes(group, count).cumsum(0) - sizes(group, count)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place - start[group]


def top_share(score: torch.Tensor, group: torch.Tensor, count: int, keep: float, up: bool = False) -> torch.Tensor:
    """The share `keep` of every group with the highest scores, at least one token of each.

    Args:
        score: [t].
        group: [t] in 0..count-1.
        count: Number of groups.
        keep: Share in (0, 1].
        up: Round the number of kept tokens up instead of down.

    Returns:
        [t] bool.
    """
    # keep * n may fall just beside a whole number that it stands for
    share = sizes(group, count).double() * keep
    number = ((share - 1e-6).ceil() if up else (share + 1e-6).floor()).long().clamp_min(1)
    return rank(score, group, count) < number[group]


def min_max(x: torch.Tensor, group: torch.Tensor, count: int, least: float = 0.0) -> torch.Tensor:
    """x [t] rescaled to [0, 1] within each group; 0 where a group's values differ by no more than `least`."""
    low = x.new_full((count,), torch.inf).scatter_reduce(0, group, x, "amin")
    high = x.new_full((count,), -torch.inf).scatter_reduce(0, group, x, "amax")
    span = (high - low)[group]
    return torch.where(span > least, (x - low[group]) / span.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
