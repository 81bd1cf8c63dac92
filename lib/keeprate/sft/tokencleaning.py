"""Token Cleaning (2502.01968): train on the tokens that one round of training has made easier."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from keeprate.check import choice, fraction, whole
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.baselines import SFT
from keeprate.sft.scores import rows_of, score, targets_of, with_column
from keeprate.sft.tokens import Tokens


@register(kind="selection", needs=("base losses", "reference losses"))
@dataclass(frozen=True)
class TokenCleaning(SFTMethod):
    """Keep the tokens with the highest l_base - l_ref, ranked over the whole data set.

    The reference is the base model after training on a part of the data. With a fixed reference both losses are
    computed once (`kr.sft.score`) and `prepare` chooses; `evolve` is the self-evolving form.

    Args:
        keep: Share of the target tokens that is trained on, in (0, 1].
        scope: "dataset", which needs `prepare`; or "sequence", each by itself, the baseline of the paper that it calls
            Rho.
        base: Column with l_base.
        reference: Column with l_ref.
        kept: Column that `prepare` writes.
        denominator: See `SFTMethod`.

    Source: Token Cleaning (2502.01968), influence-guided scores and global ranking.
    """

    keep: float = 0.6
    scope: str = "dataset"
    base: str = "base"
    reference: str = "reference"
    kept: str = "kept"
    denominator: str = field(default="kept", kw_only=True)

    columns: ClassVar[tuple[str, ...]] = ("base", "reference")

    def __post_init__(self):
        fraction("keep", self.keep)
        choice("scope", self.scope, ("dataset", "sequence"))
        super().__post_init__()

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.kept,) if self.scope == "dataset" else super().needed

    def score(self, t: Tokens) -> torch.Tensor:
        return t.column(self.base) - t.column(self.reference)

    def weigh(self, t: Tokens) -> torch.Tensor:
        if self.scope == "sequence":
            return t.top_share(self.score(t), self.keep, "sequence").to(t.nll.dtype)
        if self.kept not in t.columns:
            raise ValueError(f"{self!r} ranks the whole data set: give it data = method.prepare(data)")
        return t.column(self.kept).to(t.nll.dtype)

    def prepare(self, data: Any) -> Any:
        """The data set with a column that says which tokens are trained on: exactly int(keep * targets) of them.

        Args:
            data: Rows with the columns of both losses.

        Returns:
            The same kind of data set. Ties go to the earlier token.
        """
        rows = list(data)
        target = [np.asarray(targets_of(row)) >= 0 for row in rows]
        losses = [(np.asarray(row[self.base]), np.asarray(row[self.reference])) for row in rows]
        gain = np.concatenate([(a - b)[mask] for (a, b), mask in zip(losses, target, strict=True)])
        number = int(self.keep * len(gain) + 1e-6)
        chosen = np.zeros(len(gain), dtype=np.int64)
        chosen[np.argsort(-gain, kind="stable")[:number]] = 1
        kept, start = [], 0
        for mask in target:
            line = np.zeros(len(mask), dtype=np.int64)
            line[mask] = chosen[start : start + mask.sum()]
            kept.append(line.tolist())
            start += mask.sum()
        return with_column(data, self.kept, kept)


def evolve(
    model: nn.Module,
    data: Any,
    train: Callable[[nn.Module, list[dict[str, Any]], SFTMethod], Any],
    method: TokenCleaning | None = None,
    parts: int = 5,
) -> list[dict[str, Any]]:
    """Self-evolving cleaning: every part of the data is cleaned by the model that the parts before it have made.

    The first part is trained on whole. For each later one the reference is the model as it stands, the base is the
    model of the beginning, and the model is trained on. Nothing is written down in between: what is interrupted begins
    anew, from the weights of the beginning.

    Args:
        model: Trained in place.
        data: Rows with `input_ids` and perhaps `labels`, in the order of training.
        train: Called with model, rows and method for every part, such as
            `lambda m, rows, method: kr.sft.train(m, rows, method, steps=20)`.
        method: Share and names; the paper's when None.
        parts: Number of parts, nearly equal.

    Returns:
        The rows of all parts but the first, with the columns of the method.

    Raises:
        ValueError: If there are fewer rows than parts.

    Source: Token Cleaning (2502.01968), self-evolving cleaning.
    """
    method = TokenCleaning() if method is None else method
    rows = rows_of(data)
    if len(rows) < whole("parts", parts, 2):
        raise ValueError(f"parts must be at most the number of rows, {len(rows)}; got {parts}")
    rows = score(model, rows).join(rows, method.base)  # before anything is trained
    bounds = np.linspace(0, len(rows), parts + 1).round().astype(int)
    train(model, rows[: bounds[1]], SFT())
    cleaned = []
    for start, end in pairwise(bounds[1:].tolist()):
        part = rows[start:end]
        part = method.prepare(score(model, part).join(part, method.reference))
        train(model, part, method)
        cleaned += part
    return cleaned
