"""Attention Debiasing: take the trend along the sequence, and padding, out of an attention score."""

from dataclasses import dataclass
from typing import Any

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Choice, Inside, InsideMethod, MLLMMethod, Visual, Wrapper
from keeprate.mllm.fastv import FastV
from keeprate.reduce import Reduction


@register(kind="wrapper")
@dataclass(frozen=True)
class AttentionDebiasing(Wrapper):
    """s'[n] = s[n] w[n] with w[n] = exp(-b n): the score of a pruner without the growth it shows towards the text.

    b is fitted once per model and pruner on the mean score of a set of samples, a different one from the test's
    (`AttentionDebiasing.fit`). Position n counts the visual tokens of a sample (of an image for a method before the
    language model). The low-order correction that the release adds for FastV is left out: its script is not published.

    Args:
        base: A method that scores tokens by attention; FastV when None.
        slope: b per token of the image; 0 leaves the base as it is.

    Source: Attention Debiasing for Token Pruning in Vision Language Models, exponential fit.
    """

    slope: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        number("slope", self.slope)
        if not isinstance(self.base, BeforeMethod | InsideMethod) or _unscored(self.base):
            raise ValueError(f"AttentionDebiasing needs a method that scores tokens as base; got {self.base!r}")

    @classmethod
    def default(cls) -> MLLMMethod:
        return FastV()

    @classmethod
    def fit(cls, base: MLLMMethod, scores: torch.Tensor, **params: Any) -> "AttentionDebiasing":
        """Fit the slope to scores that the base gave a set of samples.

        Args:
            base: The method.
            scores: [samples, n] scores as `trace.scores` of its runs holds them; NaN = no token.
            **params: Other fields.

        Raises:
            ValueError: On scores that are not positive on average.

        Example:
            >>> with FastV()(model) as trace:                                        # doctest: +SKIP
            ...     model(**calibration)
            >>> AttentionDebiasing.fit(FastV(), trace.scores[0], keep=1 / 9)          # doctest: +SKIP
        """
        mean = scores.float().nanmean(0)
        there = mean.isfinite() & (mean > 0)
        if int(there.sum()) < 2:
            raise ValueError("fitting a trend needs positive mean scores at two positions at least")
        y = mean[there].log()
        n = torch.arange(len(mean), device=y.device)[there].float()
        n, y = n - n.mean(), y - y.mean()
        return cls(base=base, slope=(n @ y / (n @ n)).item(), **params)

    def score(self, t: Visual | Inside) -> torch.Tensor:
        """The base's scores without the trend."""
        scores = self.base.score(t).float()
        ids = t.ids if isinstance(t, Inside) else torch.arange(t.n, device=scores.device)
        return scores * torch.exp(-self.slope * ids)

    def before(self, t: Visual) -> Choice | Reduction | torch.Tensor | None:
        return self._decide(t) if isinstance(self.base, BeforeMethod) else self.base.before(t)

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        return self._decide(t) if isinstance(self.base, InsideMethod) else self.base.inside(t)

    def _decide(self, t: Visual | Inside) -> Choice | Reduction | torch.Tensor | None:
        return None if self.base.keeps_all(t) else self.base.choose(t, self.score(t))


def _unscored(method: MLLMMethod) -> bool:
    return type(method).score in (BeforeMethod.score, InsideMethod.score)
