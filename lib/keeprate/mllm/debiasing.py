"""Attention Debiasing: take the trend along the sequence, and padding, out of an attention score."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from keeprate.anatomy import Multimodal
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
    language model), and every cut of the base uses w; the release changes only the first one of PyramidDrop. The
    low-order correction that the release adds for FastV is left out: its script is not published.

    Padding that made a picture square (`padding`) scores below all else, 0 where scores are attention, and the budget
    shrinks to the other tokens where it asks for more. The release works out from the picture's original size where the
    padding is; here it is found in the pixels (`bars`).

    Args:
        base: A method that scores tokens by attention; FastV when None. Where it chooses by more than its score (DART,
            BTP), padding may stay.
        slope: b per token of the image; 0 leaves the base as it is.
        padding: Share of padding above which a token counts as padding, with a base inside the language model; 0.5 in
            the release for FastV. None = the rule is off.

    Source: Zhao et al. 2025 (2508.17807) and its code, exponential fit.
    """

    slope: float = 0.0
    padding: float | None = None

    def __post_init__(self):
        super().__post_init__()
        number("slope", self.slope)
        if not isinstance(self.base, BeforeMethod | InsideMethod) or _unscored(self.base):
            raise ValueError(f"AttentionDebiasing needs a method that scores tokens as base; got {self.base!r}")
        if self.padding is not None:
            number("padding", self.padding, 0, 1)
            if not isinstance(self.base, InsideMethod):
                raise ValueError(f"padding needs a base inside the language model; got {self.base!r}")

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

    def parts_of(self, model: nn.Module) -> Multimodal:
        parts = super().parts_of(model)
        if self.padding is not None and parts.windowed:
            raise ValueError(f"padding has no meaning on {parts.name}, whose pictures keep their shape; got {self!r}")
        return parts

    def score(self, t: Visual | Inside) -> torch.Tensor:
        """The base's scores [i, n] or [b, v] without the trend, padding below all others."""
        scores = self.base.score(t).float()
        ids = t.ids if isinstance(t, Inside) else torch.arange(t.n, device=scores.device)
        scores = scores * torch.exp(-self.slope * ids)
        if self.padding is None:
            return scores
        there = scores if t.valid is None else scores.masked_fill(~t.valid, 0.0)
        low = there.amin(1, keepdim=True).clamp_max(0.0)
        # a hair below, for attention that is exactly 0
        return torch.where(self._padded(t), torch.nextafter(low, low - 1), scores)

    def before(self, t: Visual) -> Choice | Reduction | torch.Tensor | None:
        return self._host.before(t)

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        return self._host.inside(t)

    @property
    def _host(self) -> MLLMMethod:
        """The base with our score in place of its own; whatever else it does, it does as ever."""
        host = copy(self.base)
        object.__setattr__(host, "score", self.score)
        if self.padding is not None:
            object.__setattr__(host, "count", self._count)
        return host

    def _count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        """[b] what the base would keep, at most the tokens that are no padding, at least one."""
        shown = ~self._padded(t) if t.valid is None else ~self._padded(t) & t.valid
        return torch.minimum(self.base.count(t, scores), shown.sum(1)).clamp_min(1)

    def _padded(self, t: Inside) -> torch.Tensor:
        """[b, v] tokens that show more padding than `padding`; where patches make a token, the mean of theirs."""
        share = t.common.get("padding")  # looked for once a prompt
        if share is None:
            if t.session.pixels is None:
                raise ValueError("padding reads the pictures, but they were encoded outside the `with` block")
            share = F.avg_pool2d(bars(t.session.pixels).float()[:, None], t.parts.tower.config.patch_size)
            share = t.common["padding"] = t.session.encoder.tokens(share.flatten(2).transpose(1, 2))[:, 0]
        return t.session.of_tokens(share, t.ids) > self.padding


def bars(pixels: torch.Tensor, tolerance: float = 1e-3) -> torch.Tensor:
    """Where pictures were padded to another shape: rows and columns of one colour along their borders.

    Args:
        pixels: [i, c, h, w].
        tolerance: Difference up to which two values are the same colour; well below one step of 256 levels.

    Returns:
        bool [i, h, w]; none in a picture that is of one colour altogether.
    """

    def border(x: torch.Tensor) -> torch.Tensor:
        """[i, h] rows before the first one that differs from the corner."""
        same = ((x - x[:, :, :1, :1]).abs() <= tolerance).all(3).all(1)
        return same.long().cumprod(1) > 0

    rows = border(pixels) | border(pixels.flip(2)).flip(1)
    turned = pixels.transpose(2, 3)
    cols = border(turned) | border(turned.flip(2)).flip(1)
    found = rows[:, :, None] | cols[:, None]
    return found & ~found.flatten(1).all(1)[:, None, None]


def _unscored(method: MLLMMethod) -> bool:
    return type(method).score in (BeforeMethod.score, InsideMethod.score)
