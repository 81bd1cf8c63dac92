"""PiToMe: merge only tokens that have many look-alikes, and protect the isolated ones."""

from dataclasses import dataclass

import torch

from keeprate import score, select
from keeprate.check import number
from keeprate.method import register
from keeprate.reduce import Reduction
from keeprate.vit.base import StagedMethod, Tokens
from keeprate.vit.tome import merge_in_rounds


@register(kind="merging", needs=("keys",))
@dataclass(frozen=True)
class PiToMe(StagedMethod):
    """The 2r tokens of highest energy may merge: taken alternately in order of energy, one half joins the other.

    r = int(n - keep n) of the n tokens present. The margin above which tokens count as look-alikes falls with
    depth, margin - 0.8 l / L at block l = 0..L-1.

    Args:
        keep: Fraction of the tokens present that is left by each block.
        layers: 1-based blocks; None = every block.
        margin: Margin in the first block.
        slope: How far it has fallen after the last; the authors use 0.8 for DeiT and 0.9 for AugReg and MAE weights.
        alpha: Penalty of dissimilar tokens in the energy.
        proportional: Add log(size) to the attention logits.

    Source: Tran et al. 2024 (2405.16148); the margin's schedule is the authors' code.
    """

    keep: float = 0.925
    margin: float = 0.9
    slope: float = 0.8
    alpha: float = 1.0
    proportional: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("margin", "slope", "alpha"):
            number(name, getattr(self, name))

    def placement(self, depth: int, patches: int) -> tuple[int, ...]:
        return tuple(range(1, depth + 1)) if self.layers is None else super().placement(depth, patches)

    def count(self, t: Tokens) -> int:
        keep = self.budget.keep
        return super().count(t) if keep is None else t.n - int(t.n * (1 - keep) + 1e-9)

    def select(self, t: Tokens, k: int) -> Reduction:
        margin = self.margin - self.slope * (t.layer - 1) / t.depth

        def pairs(metric: torch.Tensor, size: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
            order = score.energy(metric, margin, self.alpha).sort(dim=1, descending=True, stable=True).indices
            return select.bipartite(metric, r, order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2])

        return merge_in_rounds(t.keys(), t.size, t.n - k, pairs)
