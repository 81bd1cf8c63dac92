"""A2SF (2407.20485): accumulative attention with a forgetting factor, so that old tokens do not win by age alone."""

from dataclasses import dataclass

import torch

from keeprate.check import number, whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("received attention",))
@dataclass(frozen=True)
class A2SF(EvictMethod):
    """S_t = alpha * S_(t-1) + A[t, :], so S[k] = sum_q alpha^(n-1-q) A[q, k], summed over the query group.

    alpha = 1 is H2O's sum; alpha -> 0 the newest row alone.

    Args:
        keep: See `EvictMethod`.
        alpha: Forgetting factor in [0, 1]; the paper tunes 0.1 to 0.9 by task.
        recent: Last tokens that stay.

    Source: A2SF (2407.20485), attention scores accumulated with a forgetting factor.
    """

    when = "decode"

    alpha: float = 0.5
    recent: int = 16

    def __post_init__(self):
        number("alpha", self.alpha, 0, 1)
        whole("recent", self.recent, 0)
        super().__post_init__()

    def protected(self) -> int:
        return self.recent

    def protect(self, step: Step) -> torch.Tensor:
        return step.recent(self.recent)

    def fold(self, step: Step) -> None:
        if step.m == 1:
            received = step.received()
        else:
            age = torch.arange(step.m - 1, -1, -1, device=step.view.q.device)
            weight = (self.alpha**age).float()
            rows = max(1, int((weight > 1e-9).sum()))  # rows too old to count are not computed
            weight = weight[-rows:] if step.real is None else weight[-rows:] * step.real[:, None, -rows:]
            received = step.view.tail(rows).received(weight)
        step.cache.carry("decayed").mul_(self.alpha**step.m).add_(step.by_kv_head(received, "sum"))

    def score(self, step: Step) -> torch.Tensor:
        return step.cache.carry("decayed")
