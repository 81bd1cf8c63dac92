"""ATC: agglomerative clustering of the tokens, bottom up."""

from dataclasses import dataclass

from keeprate import score, select
from keeprate.check import choice
from keeprate.method import register
from keeprate.reduce import Reduction, merge
from keeprate.vit.base import StagedMethod, Tokens


@register(kind="merging", needs=("keys",))
@dataclass(frozen=True)
class ATC(StagedMethod):
    """Hierarchical clustering of the keys by cosine distance, cut at int(keep^i n) clusters; size-weighted means.

    The authors cluster image by image on the CPU; here the whole batch is clustered by matrix operations.

    Args:
        linkage: Distance between clusters: "single", "complete" or "average".
        proportional: Add log(size) to the attention logits.

    Source: Haurum et al. 2024 (2409.11923).
    """

    linkage: str = "average"
    proportional: bool = True

    def __post_init__(self):
        super().__post_init__()
        choice("linkage", self.linkage, select.LINKAGES)

    def select(self, t: Tokens, k: int) -> Reduction:
        labels = select.agglomerative(1 - score.similarity(t.keys()), k, self.linkage)
        return merge(labels, t.size, k=k)
