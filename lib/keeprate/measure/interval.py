"""Numbers with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch


@dataclass(frozen=True)
class Interval:
    """A number and the range it may lie in.

    Attributes:
        value: The estimate.
        low, high: Ends of its interval.
        n: Number of observations behind it.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), as `run.metric` and `run.claim` take it."""
        return self.low, self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


def bootstrap(
    values: np.ndarray | torch.Tensor | Sequence[float],
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic. Observations that are all equal give an interval without width.

    Args:
        values: [samples, ...] observations, resampled along the first axis.
        statistic: Array of the shape of `values` -> number.
        confidence: Share of resamples inside the interval.
        n: Number of resamples.
        seed: Of the resampling.

    Returns:
        The statistic of `values` with its interval.

    Raises:
        ValueError: On no observations, NaN, or a confidence outside (0, 1).

    Example:
        >>> bootstrap([1.0, 0.0, 1.0, 1.0])
        0.75 [0.25, 1] (n=4)
    """
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=float)
    if values.size == 0 or np.isnan(values).any():
        raise ValueError(
            f"values must hold at least one number and no NaN; got {np.isnan(values).sum()} NaN in {values.shape}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence!r}")
    index = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    if statistic is np.mean and values.ndim == 1:
        resampled = values[index].mean(1)
    else:
        resampled = np.array([statistic(values[i]) for i in index])
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(values)), float(low), float(high), len(values))


def paired_difference(
    a: np.ndarray | torch.Tensor | Sequence[float],
    b: np.ndarray | torch.Tensor | Sequence[float],
    confidence: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the same samples, with a bootstrap interval that resamples the pairs.

    Args:
        a, b: [samples] observations of the same samples in the same order, such as `Evaluation.correct`.
        confidence, n, seed: As in `bootstrap`.

    Raises:
        ValueError: If the lengths differ.

    Example:
        >>> paired_difference([1, 1, 1, 1], [0, 0, 0, 0]).excludes_zero
        True
    """
    a, b = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x, dtype=float) for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"pairs need two sets of one shape; got {a.shape} and {b.shape}")
    return bootstrap(a - b, confidence=confidence, n=n, seed=seed)


def wilson(right: np.ndarray | torch.Tensor | Sequence[bool], confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share. Unlike the bootstrap it has a width when every observation is the same.

    Args:
        right: [samples] boolean.
        confidence: Coverage of the interval.

    Returns:
        The share of True with its interval.

    Raises:
        ValueError: On no observations, others than booleans, or a confidence outside (0, 1).

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.

    Example:
        >>> wilson([True, True, True, True])
        1 [0.5101, 1] (n=4)
    """
    right = np.asarray(right.cpu() if isinstance(right, torch.Tensor) else right)
    if right.size == 0 or right.dtype != bool:
        raise ValueError(f"right must hold at least one boolean; got {right.size} of {right.dtype}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence!r}")
    n, p, z = right.size, float(right.mean()), NormalDist().inv_cdf((1 + confidence) / 2)
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return Interval(p, max(0.0, low), min(1.0, high), n)
