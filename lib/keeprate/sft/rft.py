"""SHAD and RFT (2412.14780): boilerplate can be learned without its input; reasoning cannot, and counts more."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from keeprate.check import fraction, number, whole
from keeprate.method import register
from keeprate.sft import groups
from keeprate.sft.base import SFTMethod
from keeprate.sft.data import IGNORE
from keeprate.sft.scores import targets_of
from keeprate.sft.tokens import Tokens


@register(kind="weighting", needs=("losses after shuffling", "losses before"))
@dataclass(frozen=True)
class RFT(SFTMethod):
    """Boilerplate and reasoning tokens each have their mean loss; the larger of the two weighs more.

        LD_t = l_shuffled(t) - l_original(t): boilerplate where LD <= 0, reasoning where LD > 0        (SHAD)
        L = w_b L_b + w_r L_r with (w_b, w_r) = softmax((L_b, L_r) / tau), without a gradient          (RFT)

    l_original are the losses of the model before training, l_shuffled those of a copy of it that was trained on a few
    rows whose outputs were exchanged (`kr.sft.shuffled`). The means are those of a micro-batch, so the loss depends on
    how a batch is cut. If one kind is missing there, the other has weight 1.

    Args:
        tau: Temperature.
        shuffled: Column with l_shuffled.
        original: Column with l_original.
        denominator: See `SFTMethod`.

    Source: SHAD and RFT (2412.14780), from the formulas of the paper; no released code was at hand.
    """

    tau: float = 1.0
    shuffled: str = "shuffled"
    original: str = "original"

    columns: ClassVar[tuple[str, ...]] = ("shuffled", "original")

    def __post_init__(self):
        number("tau", self.tau, 1e-6)
        super().__post_init__()

    def score(self, t: Tokens) -> torch.Tensor:
        return t.column(self.shuffled) - t.column(self.original)

    def weigh(self, t: Tokens) -> torch.Tensor:
        kind = (self.score(t) > 0).long()  # 1 = reasoning
        size = groups.sizes(kind, 2)
        mean = groups.totals(t.nll, kind, 2) / size.clamp_min(1)
        weight = (mean / self.tau).masked_fill(size == 0, -torch.inf).softmax(0)
        # shares of the two means, as weights of tokens whose sum is divided by their number
        return (weight * len(t) / size.clamp_min(1))[kind]


def shuffled(data: Any, share: float = 0.01, seed: int = 0) -> list[dict[str, list[int]]]:
    """A sample of rows, each with the output of another one: what SHAD trains its copy of the model on.

    Args:
        data: Rows with `input_ids` and `labels`; the output begins at the first target.
        share: Of the rows, in (0, 1]; at least two.
        seed: Of the choice.

    Returns:
        Rows with input_ids and labels.

    Raises:
        ValueError: If there are fewer than two rows, or one has no target.
    """
    fraction("share", share)
    whole("seed", seed, 0)
    if len(data) < 2:
        raise ValueError(f"outputs are exchanged between at least two rows; got {len(data)}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(data))[: max(2, round(share * len(data)))]
    halves = []
    for i in chosen:
        row = data[int(i)]
        ids, labels = list(row["input_ids"]), targets_of(row)
        start = next((j for j, label in enumerate(labels) if label != IGNORE), None)
        if start is None:
            raise ValueError(f"row {i} has no target, so no output to exchange")
        halves.append((ids[:start], ids[start:], labels[start:]))
    return [
        {"input_ids": prompt + output, "labels": [IGNORE] * len(prompt) + labels}
        # the chosen rows are in random order, so the next one's output is a random one and never the row's own
        for (prompt, _, _), (_, output, labels) in zip(halves, halves[1:] + halves[:1], strict=True)
    ]
