"""VATP (2406.12335): attention score is not all you need, the value it multiplies matters too."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Modifier, Step
from keeprate.kv.h2o import H2O
from keeprate.method import register


@register(kind="score modifier", needs=("values",))
@dataclass(frozen=True)
class VATP(Modifier):
    """Multiply any score by the l1 norm of the token's value; the first tokens stay, for their values are tiny.

    Args:
        keep: See `Modifier`.
        base: Any eviction method with non-negative scores; H2O when None. The paper's other one is Scissorhands.
        sinks: First tokens that stay.

    Source: VATP (2406.12335), attention score times the l1 norm of the value.
    """

    sinks: int = 20

    def __post_init__(self):
        whole("sinks", self.sinks, 0)
        super().__post_init__()

    @classmethod
    def default(cls) -> EvictMethod:
        return H2O()

    def protected(self) -> int:
        return self.base.protected() + self.sinks

    def score(self, step: Step) -> torch.Tensor:
        return self.base.score(step) * step.view.v.float().abs().sum(-1)

    def protect(self, step: Step) -> torch.Tensor:
        first, others = step.sinks(self.sinks), self.base.protect(step)
        return first if others is None else first | others
