"""Trimmed-Llama: drop image features that no head of the first cross-attention layer looks at."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from keeprate.attention import AttentionView
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, best

if TYPE_CHECKING:
    from keeprate.mllm.session import MLLMTrace


@register(kind="pruning", needs=("attention rows",))
@dataclass(frozen=True)
class TrimmedLlama(MLLMMethod):
    """Every head of the first cross-attention layer names its K = keep * n most attended features; their union stays.

    A feature's score in a head is the sum of the attention of all text rows that see the image. The union holds between
    K and heads * K features and differs by sample: more for prompts whose heads look at different things. Later
    cross-attention layers project and cache the features that stay, and the first one's cache is cut to them. Image
    features have no positions.

    Args:
        keep: K_ratio, the share that every head names.

    Source: Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features (2504.00557).
    """

    policy: ClassVar[str] = "keep"
    supports: ClassVar[tuple[str, ...]] = ("mllama",)

    keep: float | int | tuple = 0.25

    def features(
        self, view: AttentionView, rows: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide in the first cross-attention layer.

        Args:
            view: Its attention: text rows to image features.
            rows: [b, n] text rows that see the image.
            valid: [b, m] image features that are no padding.

        Returns:
            (bool [b, m] which stay, their scores [b, m], mean over heads).
        """
        scores = view.received(rows.float()[:, None])  # b h m
        heads = scores.shape[1]
        count = self.budget.each(valid.sum(1)).repeat_interleave(heads)
        named = best(scores.flatten(0, 1), count, valid.repeat_interleave(heads, 0))
        return named.unflatten(0, (-1, heads)).any(1), scores.mean(1)

    def __call__(
        self, model: nn.Module, *, seed: int = 0, masked: bool = False, text: Any = None
    ) -> "AbstractContextManager[MLLMTrace]":
        from keeprate.mllm.cross import CrossSession

        return CrossSession(self, self.parts_of(model), masked).attach(model)
