"""Token Pooling: replace the tokens by the cluster centres that reconstruct them best."""

from dataclasses import dataclass
from typing import ClassVar

from keeprate import select
from keeprate.check import whole
from keeprate.method import register
from keeprate.reduce import Reduction, merge
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="merging", needs=("features", "received attention"))
@dataclass(frozen=True)
class TokenPooling(StagedMethod):
    """Weighted k-means on a block's output: minimise sum_i w_i min_j ||x_i - c_j||^2, keep the centres.

    w_i is the attention token i received in the block, over heads and queries; clustering starts at the k heaviest
    tokens. The paper learns how many tokens each layer keeps; here `keep` and `layers` say it.

    Args:
        iterations: Lloyd iterations.
        weighted: Weigh by the attention received; False is plain k-means from farthest points.

    Source: Marin et al. 2021 (2110.03860), WK-Means.
    """

    iterations: int = 5
    weighted: bool = True
    where: ClassVar[str] = "before"

    def __post_init__(self):
        super().__post_init__()
        whole("iterations", self.iterations)

    def select(self, t: Tokens, k: int) -> Reduction:
        weight = t.received() if self.weighted else None
        return merge(select.k_means(t.x, k, weight, self.iterations), weight, k=k, score=weight)
