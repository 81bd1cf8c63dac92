"""DPC-KNN: merge tokens into density peaks, the clustering of TCFormer on a plain ViT."""

from dataclasses import dataclass
from typing import ClassVar

from keeprate import select
from keeprate.check import whole
from keeprate.method import register
from keeprate.reduce import Reduction, merge
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="merging", needs=("features",))
@dataclass(frozen=True)
class DPCKNN(StagedMethod):
    """Cluster centres are dense and far from anything denser; every token joins the nearest centre, plain mean.

    TCFormer learns a weight per token for the mean; training-free, all weigh the same.

    Args:
        neighbours: Nearest tokens that define density.

    Source: Zeng et al. 2022 (2204.08680); before the block, on patch tokens, as in Haurum et al. 2023.
    """

    neighbours: int = 5
    where: ClassVar[str] = "before"

    def __post_init__(self):
        super().__post_init__()
        whole("neighbours", self.neighbours)

    def select(self, t: Tokens, k: int) -> Reduction:
        centres, labels = select.dpc_knn(t.x, k, self.neighbours)
        return merge(labels, rep=centres)
