"""TL-Training (2412.15495): the tokens that decide which tool is called count more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from keeprate.check import number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("labels of a parser",))
@dataclass(frozen=True)
class TLTraining(SFTMethod):
    """Key tokens of a sequence weigh min(others / keys, cap) if they are fewer than the others; all else weighs 1.

    Key tokens are those at which tool names part (`key_places`). Tokens that end a parameter are neither: they weigh 1
    and are not counted. Only the token weights of the paper are here; it also drops turns that met an error, and goes
    on with reinforcement learning. The paper takes the mean over samples of a weighted mean, with one sample a batch;
    here a sequence counts by its weights.

    Args:
        cap: Largest weight.
        key: Column that is 1 at key tokens, 2 at tokens that end a parameter, else 0.
        denominator: See `SFTMethod`; the paper divides by the sum of the weights.

    Source: TL-Training (2412.15495), prioritising key tokens.
    """

    cap: float = 9.0
    key: str = "key"
    denominator: str = field(default="weight_sum", kw_only=True)

    columns: ClassVar[tuple[str, ...]] = ("key",)

    def __post_init__(self):
        number("cap", self.cap, 1)
        super().__post_init__()

    def weigh(self, t: Tokens) -> torch.Tensor:
        kind = t.column(self.key)
        if not ((kind == 0) | (kind == 1) | (kind == 2)).all():
            raise ValueError(f"{self.key} must be 0, 1 or 2; got values from {kind.min():g} to {kind.max():g}")
        keys, others = (t.sums((kind == k).to(t.nll.dtype)) for k in (1, 0))
        weight = (others / keys.clamp_min(1)).clamp(1, self.cap)
        return torch.where(kind == 1, weight[t.sequence], 1.0).to(t.nll.dtype)


def key_places(name: Sequence[int], others: Sequence[Sequence[int]]) -> list[int]:
    """Places in a tool's name that decide between it and the other tools.

    They are the first token, and for every other tool the first token behind the longest common prefix.

    Args:
        name: Tokens of the tool that is called.
        others: Tokens of the other tools' names; a tool of the same name is skipped.

    Returns:
        Sorted places, 0 = the first token. A name that is itself the beginning of another has no token behind the
        prefix: the place is then that of the token that follows the name.
    """
    places = {0}
    for other in others:
        if list(other) != list(name):
            shared = [a == b for a, b in zip(name, other, strict=False)]
            places.add(shared.index(False) if False in shared else len(shared))
    return sorted(places)
