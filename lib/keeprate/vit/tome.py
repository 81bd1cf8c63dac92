"""ToMe: merge the most similar pairs of a bipartite split, a few in every block."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from keeprate import select
from keeprate.budget import Budget
from keeprate.check import choice
from keeprate.method import register
from keeprate.reduce import Reduction, gather_tokens, merge, merge_pairs
from keeprate.vit.base import Tokens, ViTMethod


@register(kind="merging", needs=("keys",))
@dataclass(frozen=True)
class ToMe(ViTMethod):
    """Every second token proposes to its most similar other; the r best proposals merge by size-weighted mean.

    Args:
        r: Tokens merged in every block, or (r, inflection) for a linear schedule: (r, -1) falls from 2r to 0. Never
            more than half of the tokens present merge in one round.
        keep: Instead of r: fraction of patches left by each of a few reductions, as in the staged methods.
        layers: 1-based blocks; every block for r, quarters of the depth for keep.
        metric: "keys" (mean over heads) or "features".
        proportional: Add log(size) to the attention logits.

    Source: Bolya et al. 2023 (2210.09461).
    """

    r: int | tuple[int, float] = 13
    keep: float | int | tuple | Budget | None = None
    layers: tuple[int, ...] | None = None
    metric: str = "keys"
    proportional: bool = True

    def __post_init__(self):
        base, inflection = self.r if isinstance(self.r, tuple) and len(self.r) == 2 else (self.r, 0)
        if type(base) is not int or base < 0 or type(inflection) not in (int, float) or not -1 <= inflection <= 1:
            raise ValueError(f"r must be an integer >= 0 or (r, inflection), inflection in [-1, 1]; got {self.r!r}")
        choice("metric", self.metric, ("keys", "features"))
        if self.keep is not None and Budget.of(self.keep).ragged:
            raise ValueError(f"ToMe needs a number of tokens known in advance; got keep={self.keep!r}")

    def placement(self, depth: int, patches: int) -> tuple[int, ...]:
        if self.keep is None and max(self.schedule(depth)) > patches:
            raise ValueError(f"r must not exceed the {patches} patches present; got {self.r}")
        if self.keep is None and self.layers is None:
            return tuple(range(1, depth + 1))
        return super().placement(depth, patches)

    def schedule(self, steps: int) -> list[int]:
        """Tokens to merge at each of `steps` reductions."""
        base, inflection = self.r if isinstance(self.r, tuple) else (self.r, 0)
        first = int(base * (1 - inflection))
        rise = (2 * base - 2 * first) / max(1, steps - 1)
        return [int(first + rise * i) for i in range(steps)]

    def reduce(self, t: Tokens) -> Reduction | None:
        if self.keep is None:
            steps = t.depth if self.layers is None else len(self.layers)
            r = min(self.schedule(steps)[t.stage - 1], t.n // 2)
        else:
            r = t.n - Budget.of(self.keep).count(t.stage, t.total)
        if r <= 0:
            return None
        return merge_similar(t.keys() if self.metric == "keys" else t.x, t.size, r, t.prefix)


def merge_similar(metric: torch.Tensor, size: torch.Tensor, r: int, offset: int = 0) -> Reduction:
    """Merge r tokens into similar ones by bipartite matching of even and odd positions.

    Args:
        metric: [b, n, c] features to compare.
        size: [b, n] patches each token stands for.
        r: Tokens to merge away, below n.
        offset: Position of the first token in the full sequence; tokens at odd positions receive.
    """

    def pairs(metric: torch.Tensor, size: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(metric.shape[1], device=metric.device)
        even = (index + offset) % 2 == 0
        return select.bipartite(metric, r, index[even], index[~even])

    return merge_in_rounds(metric, size, r, pairs)


def merge_in_rounds(
    metric: torch.Tensor,
    size: torch.Tensor,
    r: int,
    pairs: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> Reduction:
    """Merge r tokens into others by size-weighted mean, in rounds when r exceeds half of the tokens.

    Args:
        metric: [b, n, c] features that decide; they merge along between rounds.
        size: [b, n] patches each token stands for.
        r: Tokens to merge away, below n.
        pairs: (metric, size, step) -> (source, target) positions [b, step] of one round, step <= n // 2.
    """
    if r >= metric.shape[1]:
        raise ValueError(f"r must be below the {metric.shape[1]} tokens present; got {r}")
    step = min(r, metric.shape[1] // 2)
    once = merge_pairs(*pairs(metric, size, step), size)
    if step == r:
        return once
    later = merge_in_rounds(once(metric), once.total(size), r - step, pairs)
    return merge(later.slot.gather(1, once.slot), size, gather_tokens(once.rep, later.rep))
