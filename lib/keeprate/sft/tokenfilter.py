"""Token filtering (2601.21571): no loss on tokens of a domain that shall not be learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.data import IGNORE
from keeprate.sft.tokens import Tokens


@register(kind="selection", needs=("labels of a classifier",))
@dataclass(frozen=True)
class TokenFilter(SFTMethod):
    """Train on tokens whose probability of belonging to the unwanted domain is at most `threshold`.

    The others stay in the context; `remove` hides them from it, too. The paper trains its classifier on labels from
    sparse autoencoders; here the probability is a column, whatever it comes from.

    Args:
        threshold: Largest probability that is trained on; the paper sets it for high recall.
        forget: Column with the probability.
        denominator: See `SFTMethod`.

    Source: Token-level data filtering (2601.21571), loss masking and removal.
    """

    threshold: float = 0.5
    forget: str = "forget"

    columns: ClassVar[tuple[str, ...]] = ("forget",)

    def __post_init__(self):
        number("threshold", self.threshold, 0, 1)
        super().__post_init__()

    def score(self, t: Tokens) -> torch.Tensor:
        return -t.column(self.forget).to(t.nll.dtype)

    def weigh(self, t: Tokens) -> torch.Tensor:
        return (t.column(self.forget) <= self.threshold).to(t.nll.dtype)

    def remove(self, row: Mapping[str, Any], hidden: int) -> dict[str, Any]:
        """A row of a data set in which unwanted tokens are replaced in the input and are no targets.

        Args:
            row: With input_ids, the column of probabilities, and labels if not every token is a target.
            hidden: The token that replaces them.
        """
        unwanted = [p > self.threshold for p in row[self.forget]]
        labels = row["input_ids"] if row.get("labels") is None else row["labels"]
        return {
            **row,
            "input_ids": [hidden if gone else i for gone, i in zip(unwanted, row["input_ids"], strict=True)],
            "labels": [IGNORE if gone else i for gone, i in zip(unwanted, labels, strict=True)],
        }
