"""CAOTE (2504.14051): evict the token whose going changes the attention output least, in closed form."""

from dataclasses import dataclass

import torch

from keeprate import score
from keeprate.kv.base import EvictMethod, Modifier, Step
from keeprate.kv.h2o import H2O
from keeprate.method import register


@register(kind="score modifier", needs=("values",))
@dataclass(frozen=True)
class CAOTE(Modifier):
    """Turn any non-negative score into the eviction error c_j = a_j / (1 - a_j) * ||o - v_j||.

    a is the base's score over its sum. Exact for one token and one query; over many evictions it is greedy.

    Args:
        keep: See `Modifier`.
        base: Any eviction method with non-negative scores; H2O when None.
        fast: Take o as the mean value instead of the weighted one (FastCAOTE).

    Source: CAOTE (2504.14051), closed form of the eviction error, and FastCAOTE.
    """

    fast: bool = False

    @classmethod
    def default(cls) -> EvictMethod:
        return H2O()

    def score(self, step: Step) -> torch.Tensor:
        weight, v = self.base.score(step), step.view.v.float()
        if step.valid is not None:
            weight = weight.masked_fill(~step.valid, 0.0)
        if not self.fast:
            return score.eviction_error(weight, v)
        there = torch.ones_like(weight) if step.valid is None else step.valid.float()
        mean = torch.einsum("bgn,bgnd->bgd", there / there.sum(-1, keepdim=True), v)
        return score.eviction_error(weight, v, mean)
