"""Localisation: does a score find the tokens that are known to matter? Vectorised over the batch."""

from dataclasses import dataclass, field

import torch

from keeprate.measure.interval import Interval, bootstrap
from keeprate.trace import Trace


def _check(name: str, x: torch.Tensor, truth: torch.Tensor) -> None:
    if truth.dim() != 2 or x.shape != truth.shape or truth.dtype != torch.bool:
        raise ValueError(
            f"{name} and truth must both be [batch, tokens], truth boolean; got {tuple(x.shape)} and "
            f"{tuple(truth.shape)} of {truth.dtype}"
        )


def auroc(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Probability that a token that matters scores higher than one that does not; ties count half. Chance is 0.5.

    Args:
        scores: [b, n], NaN = the token is absent and is left out.
        truth: [b, n] boolean.

    Returns:
        [b]; NaN where no token, or every token, matters.

    Source: Mann-Whitney U with average ranks.

    Example:
        >>> auroc(torch.tensor([[0.9, 0.1, 0.4]]), torch.tensor([[True, False, False]]))
        tensor([1.])
    """
    _check("scores", scores, truth)
    there = ~scores.isnan()
    filled = scores.double().masked_fill(~there, float("inf"))
    ordered, count = filled.sort(1).values, there.sum(1, keepdim=True)
    below = torch.searchsorted(ordered, filled)
    upto = torch.searchsorted(ordered, filled, right=True).minimum(count)  # absent tokens tie with +inf
    rank = (below + upto + 1) / 2
    yes = truth & there
    p = yes.sum(1)
    q = count.squeeze(1) - p
    u = (rank * yes).sum(1) - p * (p + 1) / 2
    return torch.where((p > 0) & (q > 0), u / (p * q), float("nan")).float()


def recall(kept: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that matter which are kept. Chance is the share of all tokens that are kept.

    Args:
        kept: [b, n] boolean.
        truth: [b, n] boolean.

    Returns:
        [b]; NaN where no token matters.
    """
    _check("kept", kept, truth)
    return (kept & truth).sum(1) / truth.sum(1)


def recall_at_budget(scores: torch.Tensor, truth: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Share of the tokens that matter among the k of highest score. Chance is k / n.

    Args:
        scores: [b, n], NaN = absent, taken last; ties go to the earlier token.
        truth: [b, n] boolean.
        k: Budget in 1..n, one for all or [b].

    Returns:
        [b]; NaN where no token matters.

    Raises:
        ValueError: On shapes that do not fit or k outside 1..n.
    """
    _check("scores", scores, truth)
    k = torch.as_tensor(k, device=scores.device)
    if int(k.min()) < 1 or int(k.max()) > scores.shape[1]:
        raise ValueError(f"k must lie in 1..{scores.shape[1]}; got {k.tolist()}")
    order = scores.nan_to_num(float("-inf"), float("inf"), float("-inf")).sort(dim=1, descending=True, stable=True)
    return recall(order.indices.argsort(1) < k.reshape(-1, 1), truth)


@dataclass(frozen=True)
class Localisation:
    """How well one reduction found the tokens that matter, per sample.

    Attributes:
        auroc: [b] of the recorded score over the patches present; None if the method records none. Chance is 0.5.
        recall: [b] share of the true patches that still stand for themselves.
        represented: [b] share of the true patches that live on in some token, merged ones included.
        chance: [b] recall of a random choice of as many patches.
    """

    auroc: torch.Tensor | None = field(repr=False)
    recall: torch.Tensor = field(repr=False)
    represented: torch.Tensor = field(repr=False)
    chance: torch.Tensor = field(repr=False)

    def summary(self) -> dict[str, Interval]:
        """Means over the samples for which each number is defined, with bootstrap intervals."""
        found = {name: getattr(self, name) for name in ("auroc", "recall", "represented", "chance")}
        found = {name: x[~x.isnan()] for name, x in found.items() if x is not None}
        return {name: bootstrap(x) for name, x in found.items() if len(x)}


def localisation(trace: Trace, truth: torch.Tensor, step: int = -1) -> Localisation:
    """Compare what a run kept with the patches that are known to matter.

    Args:
        trace: Of the run.
        truth: [b, patches] boolean, the same samples in the same order.
        step: Which reduction, counted from 0; -1 = the last.

    Raises:
        ValueError: If the trace holds no such reduction, or truth is of another size.

    Example:
        >>> localisation(result.trace, task.truth).summary()   # doctest: +SKIP
    """
    steps = trace.steps
    if not -len(steps) <= step < len(steps):
        raise ValueError(f"step must be one of the {len(steps)} reductions of this trace; got {step}")
    here, mask = steps[step], trace.mask(step)
    truth = truth.to(here.assignment.device)
    _check("the trace's patches", here.assignment, truth)
    return Localisation(
        None if here.score is None else auroc(here.score, truth),
        recall(mask.to(truth.device), truth),
        recall(here.assignment >= 0, truth),
        mask.float().mean(1),
    )
