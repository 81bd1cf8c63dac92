"""Zero-TPrune: PageRank on the attention graph, then similarity, then importance."""

from dataclasses import dataclass

import torch

from keeprate import score, select
from keeprate.check import number, whole
from keeprate.method import register
from keeprate.reduce import Reduction, drop, gather_tokens
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="pruning", needs=("attention matrix", "keys"))
@dataclass(frozen=True)
class ZeroTPrune(StagedMethod):
    """Weighted PageRank of every head's attention graph; redundant unimportant tokens go first, then the least
    important.

    I' stage: scores. S stage: the less important half loses the `similar` tokens that most resemble one of the more
    important half. I stage: the best k of the rest stay; nothing is merged.

    Args:
        similar: Tokens removed by similarity at each reduction, part of the budget.
        iterations: Power iterations in the first quarter of the blocks, in between, and in the last quarter.
        variance: Bounds on the variance of a head's scores (rescaled to mean 1) for the head to count; our reading of
            the published bounds, whose scale the paper leaves open.
        emphasise_cls: Start the class token at sqrt(n) times the others (the paper's Zero-TPrune); False is its -uni.

    Source: Wang et al. 2024 (2305.17328), from two published notes on it; there is no official code.
    """

    similar: int = 10
    iterations: tuple[int, int, int] = (30, 5, 1)
    variance: tuple[float, float] = (0.01, 0.7)
    emphasise_cls: bool = True

    def __post_init__(self):
        super().__post_init__()
        whole("similar", self.similar, 0)
        if not isinstance(self.iterations, tuple) or len(self.iterations) != 3:
            raise ValueError(f"iterations must be three integers, for early, middle and late; got {self.iterations!r}")
        for count in self.iterations:
            whole("iterations", count)
        if not isinstance(self.variance, tuple) or len(self.variance) != 2:
            raise ValueError(f"variance must be two bounds (low, high); got {self.variance!r}")
        for bound in self.variance:
            number("variance", bound, 0)

    def select(self, t: Tokens, k: int) -> Reduction:
        s = self.ranks(t)
        alive = self.distinct(t, s, min(self.similar, t.n - k, t.n // 2))
        best = select.top_k(s.gather(1, alive), k)
        return drop(alive.gather(1, best), score=s)

    def ranks(self, t: Tokens) -> torch.Tensor:
        """[b, n] PageRank over all tokens, aggregated over heads, prefix left out."""
        third = 0 if 4 * t.layer <= t.depth else 2 if 4 * (t.depth - t.layer) < t.depth else 1
        probs = t.attention.probs()
        start = torch.ones(probs.shape[-1], device=probs.device)
        if self.emphasise_cls and t.has_cls:
            start[0] = probs.shape[-1] ** 0.5
        heads = score.pagerank(probs, self.iterations[third], start)[..., t.prefix :]
        return score.rms_of_heads(heads, *self.variance)

    def distinct(self, t: Tokens, s: torch.Tensor, r: int) -> torch.Tensor:
        """[b, n - r] tokens left after the r most redundant of the less important half are gone."""
        order = s.sort(dim=1, stable=True).indices
        if r == 0:
            return order.sort(1).values
        low, high = order[:, : t.n // 2], order[:, t.n // 2 :]
        keys = t.keys()
        twin = score.similarity(gather_tokens(keys, low), gather_tokens(keys, high)).amax(-1)
        gone = low.gather(1, twin.sort(dim=1, descending=True, stable=True).indices[:, :r])
        return select.rest(gone, t.n)
