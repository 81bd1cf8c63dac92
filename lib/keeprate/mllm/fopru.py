"""FoPru: keep the tokens, or the rows of the image, that receive most attention in the vision encoder."""

from dataclasses import dataclass

import torch

from keeprate.anatomy import Multimodal
from keeprate.check import choice
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual, dropped


@register(kind="pruning", needs=("received attention",), reconstructed=True)
@dataclass(frozen=True)
class FoPru(BeforeMethod):
    """Score a token by the attention it receives, mean over heads and query rows, in the block that gives the features.

    "rank" keeps the best tokens; "row" keeps whole rows of the grid, the best ones by their mean score, as many as fit
    into the count, one at least.

    Args:
        strategy: "rank" or "row".

    Source: Jiang et al. 2024 (2411.14164), from its abstract and a summary.
    """

    strategy: str = "rank"

    def __post_init__(self):
        super().__post_init__()
        choice("strategy", self.strategy, ("rank", "row"))

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (parts.feature,)

    def score(self, t: Visual) -> torch.Tensor:
        return t.received(t.parts.feature).mean(1)

    def choose(self, t: Visual, scores: torch.Tensor) -> torch.Tensor:
        if self.strategy == "rank":
            return super().choose(t, scores)
        keep = best_rows(scores.float(), t.place, self.count(t, scores), t.valid)
        return dropped(keep, t.hide(scores))


def best_rows(
    scores: torch.Tensor, place: torch.Tensor, count: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Mask of whole grid rows: the best ones by mean score that together hold at most `count` tokens, one at least.

    Args:
        scores: [i, n].
        place: [i, n, 3] view, row and column of each token.
        count: [i] tokens.
        valid: [i, n] tokens that exist.

    Returns:
        bool [i, n].
    """
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    high = int(place[..., 1].max()) + 1
    row = (place[..., 0] * high + place[..., 1]).clamp_min(0)  # i n: number of each token's row, over all views
    rows = int(row.max()) + 1
    size = torch.zeros(len(row), rows, device=row.device).scatter_add(1, row, there.float())  # i rows
    total = torch.zeros_like(size).scatter_add(1, row, scores.masked_fill(~there, 0.0))
    mean = (total / size.clamp_min(1)).masked_fill(size == 0, float("-inf"))
    order = mean.sort(dim=1, descending=True, stable=True).indices
    fits = size.gather(1, order).cumsum(1) <= count[:, None]
    fits[:, 0] = True
    taken = torch.zeros_like(fits).scatter(1, order, fits)
    return taken.gather(1, row) & there
