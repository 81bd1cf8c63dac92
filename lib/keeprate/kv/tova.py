"""TOVA (2401.06104): a transformer is a multi-state RNN; drop the state the newest token cares least about."""

from dataclasses import dataclass

import torch

from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("attention rows",))
@dataclass(frozen=True)
class TOVA(EvictMethod):
    """Attention of the newest row, mean over all heads of the layer, so that all KV heads keep the same tokens.

    Args:
        keep: See `EvictMethod`.

    Source: Transformers are Multi-State RNNs (2401.06104), token omission via attention.
    """

    when = "decode"

    def protected(self) -> int:
        return 1

    def protect(self, step: Step) -> torch.Tensor:
        return step.recent(1)

    def score(self, step: Step) -> torch.Tensor:
        return step.shared(step.by_kv_head(step.rows(1)[:, :, 0]))
