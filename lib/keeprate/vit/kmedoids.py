"""K-medoids: keep the tokens that best stand for their neighbours."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import select
from keeprate.check import whole
from keeprate.method import register
from keeprate.reduce import Reduction, merge
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="clustering", needs=("features", "received attention"))
@dataclass(frozen=True)
class KMedoids(StagedMethod):
    """Clusters around input tokens, each point weighted by the attention it received; only the medoid's features
    survive.

    Args:
        iterations: Rounds of assignment and medoid update.
        weighted: Weigh by attention received and start from the most attended; False starts from farthest points.

    Source: the weighted objective of Token Pooling (2110.03860), run as the K-Medoids baseline of 2308.04657.
    """

    iterations: int = 3
    weighted: bool = True
    where: ClassVar[str] = "before"

    def __post_init__(self):
        super().__post_init__()
        whole("iterations", self.iterations, 0)

    def select(self, t: Tokens, k: int) -> Reduction:
        weight = t.received() if self.weighted else None
        medoids, labels = select.k_medoids(t.x, k, weight, self.iterations)
        only = torch.zeros(labels.shape, device=t.x.device).scatter(1, medoids, 1.0)
        return merge(labels, only, medoids, score=weight)
