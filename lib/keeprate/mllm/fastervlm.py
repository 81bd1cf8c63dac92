"""FasterVLM: keep what the class token of the vision encoder looks at."""

from dataclasses import dataclass

import torch

from keeprate.anatomy import Multimodal
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual


@register(kind="pruning", needs=("class attention",))
@dataclass(frozen=True)
class FasterVLM(BeforeMethod):
    """Score a token by the attention of the class token, mean over heads, in the block that gives the features.

    Without a class token: the attention received, mean over query rows. The published code keeps as many tokens of
    every view of an image; here an image's views share its budget.

    Source: Zhang et al. 2024 (2412.01818).
    """

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (parts.feature,)

    def score(self, t: Visual) -> torch.Tensor:
        return t.importance(t.parts.feature)
