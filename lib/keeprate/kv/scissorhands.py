"""Scissorhands (2305.17118): tokens that mattered keep mattering, so count how often each one did not."""

from dataclasses import dataclass

import torch

from keeprate.check import fraction, whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("attention rows",))
@dataclass(frozen=True)
class Scissorhands(EvictMethod):
    """Drop the tokens that fell below the average attention in most of the last rows, many at a time.

    A row votes against a token when A[q, k] < 1 / (tokens the row can see), A averaged over the query heads of a KV
    head; the votes of the last `history` rows are counted (one bit a row and token). When the cache exceeds its budget
    B it is cut to (1 - drop) * B, so compressions are rare. The paper's larger budgets for later layers are a schedule
    in `keep`; its variant that samples by importance is left out.

    Args:
        keep: See `EvictMethod`.
        history: Rows that vote (the paper's window of 400).
        recent: Last tokens that stay.
        drop: Share of the budget that is dropped beyond it.

    Source: Scissorhands (2305.17118), importance counted over a window of rows.
    """

    when = "decode"

    history: int = 400
    recent: int = 10
    drop: float = 0.5

    def __post_init__(self):
        whole("history", self.history)
        whole("recent", self.recent, 0)
        if self.drop != 0:
            fraction("drop", self.drop)
        super().__post_init__()

    def protected(self) -> int:
        return self.recent

    def protect(self, step: Step) -> torch.Tensor:
        return step.recent(self.recent)

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        least = max(1, self.recent)
        return (self.target(step) * (1 - self.drop)).long().clamp_min(least).expand(-1, scores.shape[1])

    def fold(self, step: Step) -> None:
        rows = min(step.m, self.history)
        against = self._against(step, rows)
        votes = step.cache.carry("votes", -(-self.history // 8), dtype=torch.uint8)
        first = step.cache.extra.get("row", 0)
        for r in range(rows):
            at = (first + r) % self.history
            byte, bit = at // 8, 1 << at % 8
            votes[..., byte] = votes[..., byte] & (255 - bit) | against[:, :, r].to(torch.uint8) * bit
        step.cache.extra["row"] = first + rows

    def _against(self, step: Step, rows: int) -> torch.Tensor:
        """[b, g, rows, n] whether each of the last rows gave a token less than its even share."""
        attention = step.by_kv_head(step.rows(rows))  # b g rows n
        visible = attention > 0
        against = visible & (attention < 1 / visible.sum(-1, keepdim=True).clamp_min(1))
        return against if step.real is None else against & step.real[:, None, -rows:, None]

    def score(self, step: Step) -> torch.Tensor:
        return self.history - _bits(step.cache.carry("votes", -(-self.history // 8), dtype=torch.uint8))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Number of bits set along the last axis of a uint8 tensor, as fp32."""
    table = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.float32, device=x.device)
    return table[x.int()].sum(-1)
