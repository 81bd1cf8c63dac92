"""A method against the truth: what it kept of what matters, how it ranks, how far outputs moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from keeprate.measure.kv.truth import Scores


def _mask(kept: torch.Tensor, n: int) -> torch.Tensor:
    """Arrival numbers [b, g, k], -1 = none, as a mask over the first n tokens [b, g, n]."""
    blank = torch.zeros(*kept.shape[:2], n + 1, dtype=torch.bool, device=kept.device)
    return blank.scatter(2, torch.where((kept >= 0) & (kept < n), kept, n), True)[..., :n]


@dataclass(frozen=True)
class Judge:
    """A truth with its orders, which many methods are compared with.

    Attributes:
        worth: For every layer [b, g, n] how much each token matters.
        place: Its place when the most important come first, 0 = the most important; ties go to the earlier token.
        rank: Its rank from below, ties share their mean.
    """

    worth: Scores
    place: Scores
    rank: Scores

    @classmethod
    def of(cls, truth: Sequence[torch.Tensor]) -> "Judge":
        """Order a truth: for every layer [b, g, n], higher = matters more."""
        worth = [x.float().contiguous() for x in truth]
        place = [x.argsort(dim=-1, descending=True, stable=True).argsort(-1) for x in worth]
        return cls(worth, place, [_rank(x) for x in worth])

    def layers(self, which: Sequence[int]) -> "Judge":
        """Some of the layers."""
        return Judge(*([parts[i] for i in which] for parts in (self.worth, self.place, self.rank)))


def recall_at_budget(
    kept: Sequence[torch.Tensor], truth: Sequence[torch.Tensor] | Judge
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of what matters was kept, against the best choice of as many tokens per head.

    Args:
        kept: For every layer the arrival numbers [b, g, k] of the kept tokens, -1 = none: `KVTrace.kept`.
        truth: For every layer [b, g, n] how much each token matters.

    Returns:
        Recall [b], share of each head's B most important tokens that are among its B kept ones; and mass [b], what the
        kept ones sum to over what the best B sum to (negative importances count as none). Means over layers and heads.

    Raises:
        ValueError: If the layers do not pair up.
    """
    judge = truth if isinstance(truth, Judge) else Judge.of(truth)
    _check_layers(kept, judge.worth)
    shares, masses = [], []
    for held, worth, place in zip(kept, judge.worth, judge.place, strict=True):
        mask = _mask(held, worth.shape[-1])
        budget = mask.sum(-1, keepdim=True)
        best, worth = place < budget, worth.clamp_min(0.0)
        shares.append(((mask & best).sum(-1) / budget.squeeze(-1).clamp_min(1)).mean(1))
        masses.append(((worth * mask).sum(-1) / (worth * best).sum(-1).clamp_min(1e-30)).mean(1))
    return torch.stack(shares).mean(0), torch.stack(masses).mean(0)


def found(kept: Sequence[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that hold the answer which are kept, mean over layers and heads.

    Args:
        kept: As in `recall_at_budget`.
        truth: [b, n] boolean, such as `Recall.truth`.

    Returns:
        [b].
    """
    masks = [_mask(held, truth.shape[1]) for held in kept]
    there = truth.to(masks[0].device)[:, None]
    return torch.stack([((mask & there).sum(-1) / there.sum(-1)).mean(1) for mask in masks]).mean(0)


def votes(kept: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """Share of the KV heads of all layers that keep each of the first n tokens: [b, n]."""
    return torch.stack([_mask(held, n).float().mean(1) for held in kept]).mean(0)


def rank_correlation(scores: Sequence[torch.Tensor], truth: Sequence[torch.Tensor] | Judge) -> torch.Tensor:
    """Spearman correlation of a method's scores with the truth, mean over layers and heads.

    Args:
        scores: For every layer [b, g, seen]; NaN = the token was not there. What exceeds the truth is left out.
        truth: For every layer [b, g, n].

    Returns:
        [b].

    Raises:
        ValueError: If the layers do not pair up.
    """
    judge = truth if isinstance(truth, Judge) else Judge.of(truth)
    _check_layers(scores, judge.worth)
    rhos = []
    for score, worth, rank in zip(scores, judge.worth, judge.rank, strict=True):
        score = score[..., : worth.shape[-1]].float()
        there = score.isfinite()
        if bool(there.all()):
            a, b = _rank(score), rank
        else:
            a, b = (_rank(x.masked_fill(~there, float("inf"))) * there for x in (score, worth))
        count = there.sum(-1, keepdim=True).clamp_min(1)
        a, b = ((x - x.sum(-1, keepdim=True) / count) * there for x in (a, b))
        scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        rhos.append(((a * b).sum(-1) / scale.clamp_min(1e-30)).mean(1))
    return torch.stack(rhos).mean(0).float()


def _rank(x: torch.Tensor) -> torch.Tensor:
    """Ranks along the last axis, ties share their mean: places of a sort, averaged over each run of equal values."""
    n = x.shape[-1]
    ordered, index = x.sort(-1)
    place = torch.arange(n, device=x.device).expand_as(x)
    new = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)  # where a run begins
    first = place.masked_fill(~new, 0).cummax(-1).values
    ends = F.pad(new[..., 1:], (0, 1), value=True)
    last = place.masked_fill(~ends, n).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(x, dtype=torch.double).scatter_(-1, index, (first + last).double() / 2)


def _check_layers(given: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    if not given or [x.shape[:2] for x in given] != [x.shape[:2] for x in truth]:
        raise ValueError(
            f"one tensor [b, g, ...] a layer in both; got {[tuple(x.shape) for x in given]} and "
            f"{[tuple(x.shape) for x in truth]}"
        )


def kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of next-token predictions from the full cache's: [b, m, v] twice -> [b], nats."""
    p, q = full.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean(1)


def output_error(full: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relative error of attention outputs ||o - o'|| / ||o||, mean over layers and rows: lists of [b, m, c] -> [b]."""
    errors = [(a.float() - b.float()).norm(dim=-1) / a.float().norm(dim=-1) for a, b in zip(full, other, strict=True)]
    return torch.stack(errors).mean((0, 2))
