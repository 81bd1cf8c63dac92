"""GreedyPrune: the most salient tokens of which no two are too alike."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, check_layers, dropped, first
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("features",), reconstructed=True)
@dataclass(frozen=True)
class GreedyPrune(InsideMethod):
    """Take the most salient token, drop from the contest all whose cosine with it exceeds tau, and so on.

    Saliency is the cosine between a token's hidden state and that of the prompt's last token, on entering the layer.
    Should no token be left in the contest, the most salient of the others fill the number.

    Args:
        tau: Greatest cosine between two chosen tokens; 1 is plain ranking by saliency.
        layer: 0-based layer before which tokens are dropped; 0 compares embeddings.

    Source: Pei et al. 2025 (2506.13166), from its stated objective: the greatest sum of saliency under the bound on
        similarity; layer and tau are not given there.
    """

    policy: ClassVar[str] = "keep"
    text_guided: ClassVar[bool] = True

    tau: float = 0.9
    layer: int = 2

    def __post_init__(self):
        super().__post_init__()
        number("tau", self.tau, -1, 1)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((self.layer,), depth, least=0)

    def score(self, t: Inside) -> torch.Tensor:
        return score.similarity(t.x, t.last_hidden[:, None])[..., 0]

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        count = self.count(t, scores)
        weight = (1 + scores).clamp_min(0)  # the same order, and not negative
        order, _ = farthest_point(
            t.x, int(count.max()), objective="suppress", weight=weight, tau=self.tau, valid=t.valid
        )
        return dropped(first(order, count, t.v), t.hide(scores))
