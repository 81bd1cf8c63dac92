"""DART: drop what duplicates a few pivot tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import whole
from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, best, check_layers, dropped
from keeprate.reduce import Reduction, gather_tokens
from keeprate.select import positions


@register(kind="pruning", needs=("keys", "features"))
@dataclass(frozen=True)
class DART(InsideMethod):
    """Every pivot in turn takes the visual tokens least similar to it; pivots are the tokens with the largest keys.

    Pivots are the visual and the question's tokens of largest ||K||_1 in layer K - 1, heads concatenated. Similarity is
    the cosine of the hidden states on entering layer K after the final norm. A pivot takes its equal part of what is
    still to be chosen.

    Published code takes keys from the cache, where their L1 norm changes with the position they are rotated to; here it
    is taken before rotation, so that padding in front changes nothing. Its count is 4 + 8 floor(keep n / 8); here the
    count is exact, the first pivots taking one token more. Visual pivots come first, each kind in reading order.

    Args:
        keep: The paper's setting of 128 of 576 tokens.
        layer: K, 0-based number of the first layer that sees fewer tokens.
        image_pivots: Visual tokens that are pivots, and are kept.
        text_pivots: Pivots among the question's tokens.

    Source: Wen et al. 2025 (2502.11494).
    """

    policy: ClassVar[str] = "keep"

    keep: float | int | tuple = 128 / 576
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self):
        super().__post_init__()
        whole("image_pivots", self.image_pivots)
        whole("text_pivots", self.text_pivots, 0)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((self.layer,), depth)

    def taps(self, depth: int) -> tuple[tuple[int, str], ...]:
        return ((self.layer - 1, "self_attn.k_proj"),)

    def score(self, t: Inside) -> torch.Tensor:
        return t.visual(self._keys(t))

    def _keys(self, t: Inside) -> torch.Tensor:
        """[b, m] ||K||_1 of every token of the sequence."""
        return t.taps[self.layer - 1, "self_attn.k_proj"][1].float().abs().sum(-1)

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        count, keys = self.count(t), self._keys(t)
        image = best(scores, count.clamp_max(self.image_pivots), t.valid)
        text = torch.zeros(t.text_slot.shape, dtype=torch.bool, device=image.device)
        if text.shape[1]:
            text = best(keys.gather(1, t.text_slot), text.sum(1) + self.text_pivots, t.text_valid)
        index, there = _pivots(image, text, t.slot, t.text_slot)
        pivots = t.norm(gather_tokens(t.sequence, index))
        cosine = score.similarity(pivots, t.norm(t.x))  # b p v
        return dropped(least_similar(cosine, there, image, count, t.valid), t.hide(scores))


def _pivots(
    image: torch.Tensor, text: torch.Tensor, slot: torch.Tensor, text_slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence slots [b, p] of the pivots of two masks [b, v] and [b, t], and which of them exist."""
    parts = []
    for mask, at in ((image, slot), (text, text_slot)):
        index, real = positions(mask)
        parts.append((at.gather(1, index), real))
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


def least_similar(
    cosine: torch.Tensor,
    there: torch.Tensor,
    kept: torch.Tensor,
    count: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Let pivots take tokens in turn, each an equal part of those still to be chosen, the first ones one more.

    Args:
        cosine: [b, p, v] similarity of pivots and tokens.
        there: [b, p] pivots that exist.
        kept: [b, v] tokens that are kept from the start.
        count: [b] tokens kept at the end.
        valid: [b, v] tokens that exist.

    Returns:
        [b, v] mask of `count` tokens.
    """
    part = (count - kept.sum(1)).clamp_min(0)
    pivots = there.sum(1)
    number = there.long().cumsum(1) - 1  # of each pivot in its sample
    quota = (part // pivots)[:, None] + (number < (part % pivots)[:, None]).long()
    quota = quota * there
    free = ~kept if valid is None else ~kept & valid
    for p in range(cosine.shape[1]):
        taken = best(-cosine[:, p], quota[:, p], free)
        kept, free = kept | taken, free & ~taken
    return kept
