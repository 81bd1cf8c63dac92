"""What methods share that reduce at several decoder layers: where they act, and how many tokens are left."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.budget import Budget
from keeprate.mllm.base import Inside, InsideMethod, check_layers


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
