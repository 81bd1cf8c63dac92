"""STAR: prune by what patches look at in the encoder, then by what the question looks at in the language model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.anatomy import Multimodal
from keeprate.method import register
from keeprate.mllm.base import Inside, Visual, best, dropped
from keeprate.mllm.staged import TwoStages
from keeprate.reduce import Reduction


@register(kind="pruning", needs=("received attention", "attention rows"), reconstructed=True)
@dataclass(frozen=True)
class STAR(TwoStages):
    """Two stages: attention received in the block that gives the features, then attention from the question's tokens.

    The latter is that of the decoder layer before the second reduction. Both are means over query rows and heads: read
    literally, the paper averages each softmax over the axis that it normalises, which gives every token the same. R and
    P of the paper are 1 - keep[0] and 1 - keep[1] / keep[0]; how one number is split between them is our choice.

    Source: Guo et al. 2025 (2505.12359), from its abstract and a review that quotes the formulas.
    """

    text_guided: ClassVar[bool] = True

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (parts.feature,)

    def before(self, t: Visual) -> Reduction | None:
        count = self.first_count(t)
        if bool((count >= t.total).all()):
            return None
        scores = t.received(t.parts.feature).mean(1)
        return dropped(best(scores, count, t.valid), t.hide(scores))

    def score(self, t: Inside) -> torch.Tensor:
        return t.from_text().mean(1)
