"""DivPrune: keep tokens that differ most from one another."""

from dataclasses import dataclass

from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual, dropped, first
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class DivPrune(BeforeMethod):
    """Greedy max-min diversity: the next token is the one whose nearest chosen token is farthest.

    Distance is 1 - cosine of the projected embeddings. The first token is the one whose nearest neighbour is farthest.
    The paper rounds ratio * n; here the count is its floor, as in all of this family.

    Args:
        keep: Share of tokens kept; the paper's ratio is 0.098.

    Source: Alvar et al. 2025 (2503.02175), algorithm 1.
    """

    keep: float | int = 0.098

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        order, _ = farthest_point(t.x, int(count.max()), start="isolated", valid=t.valid)
        return dropped(first(order, count, t.n))
