"""GAP: give the survivors of any pruner the position ids they had before."""

from dataclasses import dataclass
from typing import Any

from keeprate.check import choice
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, Wrapper
from keeprate.mllm.divprune import DivPrune


@register(kind="wrapper")
@dataclass(frozen=True)
class GAP(Wrapper):
    """Survivors stand in reading order, keep their original position ids, and so does the text behind the image.

    A merged token takes the id of the token it stands at. This is `positions="keep"` of any method, under the name of
    the paper that showed what it is worth: pruning with ids numbered anew destroys grounding, this brings most of it
    back.

    Args:
        positions: "keep", which is the method.
        base: The method whose positions are kept; DivPrune when None.

    Source: Grounding-Aware Token Pruning (2025).
    """

    positions: str | None = "keep"

    def __post_init__(self):
        choice("positions", self.positions, ("keep",))
        super().__post_init__()

    @classmethod
    def default(cls) -> MLLMMethod:
        return DivPrune()

    def policy_on(self, parts: Any) -> str:
        return "keep"
