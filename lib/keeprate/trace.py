"""What a run kept: original indices, sizes and assignments of every layer and sample."""

from dataclasses import dataclass, field

import torch


@dataclass
class Step:
    """One reduction of one forward pass.

    Attributes:
        layer: 1-based block in (or before) which it happened.
        kept: [b, m] original patch of every slot, sorted; -1 = padding, or a token that stands for no single patch.
        size: [b, m] number of original patches each slot stands for, 0 = padding.
        assignment: [b, n0] slot of every original patch, -1 = dropped by now.
        score: [b, n0] score of every patch that was present, NaN for the others; None if the method has no score.
    """

    layer: int
    kept: torch.Tensor
    size: torch.Tensor
    assignment: torch.Tensor
    score: torch.Tensor | None = None


@dataclass
class Trace:
    """Record of the forward passes run inside a method's `with` block; the samples of all of them stand in one batch.

    Example:
        >>> with kr.vit.ToMe(r=8)(vit.model) as trace:   # doctest: +SKIP
        ...     vit.model(pixels)
        >>> trace.kept[-1]                               # doctest: +SKIP
    """

    method: str = ""
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    depth: int = 0
    runs: list[list[Step]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """Steps of all forward passes joined along the batch; what is narrower is padded with -1, 0 or NaN."""
        if not self.runs:
            return []
        return [join_steps(same) for same in zip(*self.runs, strict=True)]

    @property
    def layers(self) -> list[int]:
        """1-based layers at which a reduction happened."""
        return [step.layer for step in self.runs[0]] if self.runs else []

    @property
    def kept(self) -> list[torch.Tensor]:
        """[b, m] original patches for each reduction, -1 = padding or summary token."""
        return [step.kept for step in self.steps]

    @property
    def sizes(self) -> list[torch.Tensor]:
        """[b, m] patches per slot for each reduction."""
        return [step.size for step in self.steps]

    @property
    def assignments(self) -> list[torch.Tensor]:
        """[b, n0] slot of every original patch for each reduction, -1 = dropped."""
        return [step.assignment for step in self.steps]

    @property
    def scores(self) -> list[torch.Tensor | None]:
        """[b, n0] scores for each reduction."""
        return [step.score for step in self.steps]

    def counts(self) -> torch.Tensor:
        """[b, depth] number of tokens (patches and summaries, without the prefix) that leave every block."""
        n0 = self.grid[0] * self.grid[1] if not self.steps else self.steps[0].assignment.shape[1]
        counts = torch.full((sum(self.batches), self.depth), n0)
        for step in self.steps:
            counts[:, step.layer - 1 :] = (step.size > 0).sum(1, keepdim=True).cpu()
        return counts

    def mask(self, step: int = -1) -> torch.Tensor:
        """[b, n0] boolean: which original patches still stand for themselves after a reduction."""
        kept, assignment = self.kept[step], self.assignments[step]
        mask = torch.zeros(len(kept), assignment.shape[1] + 1, dtype=torch.bool, device=kept.device)
        return mask.scatter(1, kept + 1, True)[:, 1:]  # -1 lands in column 0


def join_steps(steps: tuple[Step, ...]) -> Step:
    """The same reduction of several forward passes, one batch behind the other."""
    if len(steps) == 1:
        return steps[0]

    def join(tensors: list[torch.Tensor], fill: float) -> torch.Tensor:
        width = max(x.shape[1] for x in tensors)
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in tensors])

    scores = None
    if any(s.score is not None for s in steps):
        blank = [torch.full(s.assignment.shape, float("nan"), device=s.kept.device) for s in steps]
        scores = join([b if s.score is None else s.score for s, b in zip(steps, blank, strict=True)], float("nan"))
    return Step(
        steps[0].layer,
        join([s.kept for s in steps], -1),
        join([s.size for s in steps], 0),
        join([s.assignment for s in steps], -1),
        scores,
    )
