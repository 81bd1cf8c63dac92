"""PyramidDrop: drop a share of the visual tokens at the end of every stage of the language model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, check_layers
from keeprate.mllm.staged import StagedMethod


@register(kind="pruning", needs=("attention rows",))
@dataclass(frozen=True)
class PyramidDrop(InsideMethod):
    """Before each of a few layers, rank tokens by that layer's own attention row of the prompt's last token.

    The row is computed with the norm and the projections of the layer about to run, mean over heads. Stage i leaves
    keep^i of the visual tokens.

    Args:
        keep: lambda; or a schedule, one entry a stage, as shares of the tokens the prompt came with. A number of tokens
            is left by every stage alike, so that the first one decides.
        layers: 0-based layers; None = after a quarter, half and three quarters of the depth (8, 16, 24 of 32).

    Source: Xing et al. 2024 (2410.17247).
    """

    staged: ClassVar[bool] = True
    check_schedule = StagedMethod.check_schedule

    keep: float | int | tuple = 0.5
    layers: tuple[int, ...] | None = None

    def layers_at(self, depth: int) -> tuple[int, ...]:
        quarters = tuple(sorted({max(1, depth * q // 4) for q in (1, 2, 3)}))
        layers = check_layers(quarters if self.layers is None else self.layers, depth)
        self.check_schedule(len(layers))
        return layers

    def count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        if self.budget.keep is None:
            return super().count(t, scores)
        return (t.total * self.budget.keep**t.stage + 1e-6).long().clamp_min(1)

    def score(self, t: Inside) -> torch.Tensor:
        return t.from_last(ahead=True).mean(1)
