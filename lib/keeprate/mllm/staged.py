"""What methods share that reduce at several decoder layers: where they act, and how many tokens are left."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.budget import Budget
from keeprate.check import fraction
from keeprate.mllm.base import Inside, InsideMethod, MLLMMethod, Visual, best, check_layers, dropped
from keeprate.reduce import Reduction


def at_depth(layers: tuple[int, ...], depth: int, of: int = 32) -> tuple[int, ...]:
    """Layers of a model with `of` decoder layers at the same share of another depth, moved apart where they would meet.

    Args:
        layers: 0-based and increasing.
        depth: Decoder layers of the model at hand.

    Returns:
        As many layers in 1..depth-1, increasing.

    Raises:
        ValueError: If the model has too few layers.

    Example:
        >>> at_depth((3, 7, 16), 32), at_depth((3, 7, 16), 6)
        ((3, 7, 16), (1, 2, 3))
    """
    if depth <= len(layers):
        raise ValueError(f"a method that acts at {len(layers)} layers needs a deeper model; got {depth} decoder layers")
    scaled = [0]
    for i, layer in enumerate(layers):
        # room is left for the layers still to come
        scaled.append(min(max(layer * depth // of, scaled[-1] + 1), depth - len(layers) + i))
    return tuple(scaled[1:])


@dataclass(frozen=True)
class StagedMethod(InsideMethod):
    """An inside method with several reductions.

    Args:
        keep: A schedule has one entry a stage, shares of the tokens the prompt came with. One number is what the last
            stage leaves; the stages before it approach that with equal ratios, keep^(i / stages).
        layers: 0-based layers before which the stages act; None = the paper's, scaled to the model's depth.
    """

    staged: ClassVar[bool] = True
    where: ClassVar[tuple[int, ...]] = ()  # the paper's layers in a model of 32

    keep: float | int | tuple | Budget = 1 / 9
    layers: tuple[int, ...] | None = None

    def layers_at(self, depth: int) -> tuple[int, ...]:
        layers = at_depth(self.where, depth) if self.layers is None else check_layers(self.layers, depth)
        self.check_schedule(len(layers))
        return layers

    def stages(self, depth: int) -> int:
        """Number of reductions that `keep` speaks of."""
        return len(self.layers_at(depth))

    def check_schedule(self, stages: int) -> None:
        """Refuse a schedule that is not as long as there are stages."""
        schedule = self.budget.schedule
        if schedule is not None and len(schedule) != stages:
            raise ValueError(f"{self.name} reduces {stages} times: keep needs one entry each; got {self.keep!r}")

    def count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        budget = self.budget
        if budget.ragged or budget.schedule is not None:
            return super().count(t, scores)
        total = t.total.double()
        share = budget.each(t.total) / total if budget.keep is None else budget.keep
        return (total * share ** (t.stage / self.stages(t.depth)) + 1e-6).long().clamp_min(1)


@dataclass(frozen=True)
class TwoStages(MLLMMethod):
    """Base of methods that reduce before the language model and once more inside it.

    Args:
        keep: Share (or number) of tokens, mean over the decoder layers, from which both counts follow; or the two
            counts themselves, as shares of all tokens or numbers.
        layer: 0-based decoder layer of the second reduction; None = half the depth (16 of 32).
        second: Share of the first count that the second reduction leaves. Where the mean is so high that the first
            reduction would have to keep more than there is, it keeps all, and the second follows from the mean.
    """

    staged: ClassVar[bool] = True

    keep: float | int | tuple | Budget = 1 / 9
    layer: int | None = None
    second: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        fraction("second", self.second)
        budget = self.budget
        if budget.ragged or (budget.schedule is not None and len(budget.schedule) != 2):
            raise ValueError(f"{self.name} takes a share, a number or two of them; got keep={self.keep!r}")

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((max(1, depth // 2) if self.layer is None else self.layer,), depth)

    def shares(self, total: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that the two reductions would leave of `total` [b], not rounded where they follow from a mean."""
        budget = self.budget
        if budget.schedule is not None:
            first = budget.each(total)
            return first.double(), torch.minimum(budget.each(total, 2), first).double()
        mean = total.double() * budget.keep if budget.tokens is None else torch.full_like(total, budget.tokens).double()
        before = self.layers_at(depth)[0] / depth  # share of the layers that only the first reduction reaches
        first = torch.minimum(mean / (before + (1 - before) * self.second), total.double())
        return first, (mean - first * before) / (1 - before)

    def first_count(self, t: Visual) -> torch.Tensor:
        """[i] tokens that every image keeps before the language model."""
        first, _ = self.shares(t.total, t.parts.depth)
        return torch.minimum((first + 1e-6).long().clamp_min(1), t.total)

    def second_count(self, t: Inside) -> torch.Tensor:
        """[b] tokens that every sample keeps inside: of those present, the second count as a share of the first."""
        first, then = self.shares(t.total, t.depth)
        return torch.minimum((t.count * (then / first) + 0.5).long().clamp_min(1), t.count)

    def score(self, t: Inside) -> torch.Tensor:
        """[b, v] importance in the second reduction, higher = keep."""
        raise NotImplementedError(f"{self.name} does not say how it scores")

    def inside(self, t: Inside) -> Reduction | None:
        count = self.second_count(t)
        if bool((count >= t.count).all()):
            return None
        scores = self.score(t)
        return dropped(best(scores, count, t.valid), t.hide(scores))
