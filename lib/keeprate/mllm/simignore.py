"""Simignore: ignore visual tokens that resemble no word of the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class Simignore(BeforeMethod):
    """Score a token by its largest cosine to the embedding of any word of the question.

    Walking down the list of all pairs of token and word, sorted by similarity, until k distinct tokens are met chooses
    the same ones. The published evaluation hides the others from attention, here they are removed; its walk starts at
    the second pair, here at the first; and its words are those of the answer options, here the whole question.

    Args:
        keep: The paper's k2 is 452 of 576.

    Source: Zhang et al. 2024 (2412.09817).
    """

    policy: ClassVar[str] = "keep"
    text_guided: ClassVar[bool] = True

    keep: float | int | tuple = 452 / 576

    def score(self, t: Visual) -> torch.Tensor:
        text, valid = t.question()
        cosine = score.similarity(t.x, text)  # i n t
        return (cosine if valid is None else cosine.masked_fill(~valid[:, None], -1.0)).amax(-1)
