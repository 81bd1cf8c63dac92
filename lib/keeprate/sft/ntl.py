"""NTL (2411.02083): among digits, a near miss is better than a wide one."""

from dataclasses import dataclass
from typing import Any

import torch

from keeprate.check import choice, number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="auxiliary loss", needs=("digit logits",))
@dataclass(frozen=True)
class NTL(SFTMethod):
    """Plain fine-tuning plus a regression on digits.

    q = softmax over the logits of the digits D with values v; y = value of the target, where the target is a digit:

        "was"   sum_j q_j |v_j - y|        "mse"   (sum_j q_j v_j - y)^2

    The mean over the digits of the micro-batch is added to the loss, times `weight`. The first is 0 only if all of q is
    on the right value; the second also where 4 and 6 share it and 5 is right. Where gradients are accumulated, a
    micro-batch's mean counts by its share of the denominator, so it differs a little from the mean over all digits.

    Args:
        loss: "was" or "mse".
        weight: Of the regression.
        digits: Tokens that are a digit. Make the method with `NTL.of(tokenizer)`.
        values: Their values.
        denominator: See `SFTMethod`.

    Source: Number token loss (2411.02083), NTL-WAS and NTL-MSE.

    Example:
        >>> NTL.of(llm.processor, loss="mse")   # doctest: +SKIP
    """

    loss: str = "was"
    weight: float = 0.3
    digits: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self):
        choice("loss", self.loss, ("was", "mse"))
        number("weight", self.weight, 0)
        object.__setattr__(self, "digits", tuple(self.digits))
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.digits) != len(self.values):
            raise ValueError(f"NTL needs a value for every digit; got {len(self.digits)} and {len(self.values)}")
        super().__post_init__()

    @classmethod
    def of(cls, tokenizer: Any, **params: Any) -> "NTL":
        """The method for a tokenizer: its single digits, with and without a space before them.

        Args:
            tokenizer: A Hugging Face tokenizer.
            **params: Other fields.

        Raises:
            ValueError: If it has no token that is a single digit.
        """
        every = range(len(tokenizer))
        text = {i: tokenizer.decode([i]).strip() for i in every}
        found = {i: int(word) for i, word in text.items() if len(word) == 1 and word in "0123456789"}
        if not found:
            raise ValueError(f"{type(tokenizer).__name__} has no token that is a single digit")
        return cls(digits=tuple(found), values=tuple(map(float, found.values())), **params)

    def weigh(self, t: Tokens) -> torch.Tensor:
        return torch.ones_like(t.nll)

    def score(self, t: Tokens) -> torch.Tensor:
        return self.numeric(t).to(t.nll.dtype)

    def numeric(self, t: Tokens) -> torch.Tensor:
        """Which targets are digits, [t] bool."""
        if not self.digits:
            raise ValueError("NTL needs the tokens that are digits: make it with kr.sft.NTL.of(tokenizer)")
        return torch.isin(t.label, torch.tensor(self.digits, device=t.label.device))

    def extra(self, t: Tokens) -> torch.Tensor | None:
        rows = self.numeric(t).nonzero()[:, 0]
        if not len(rows) or self.weight == 0:
            return None
        digits = torch.tensor(self.digits, device=rows.device)
        q = t.head.columns(rows, digits).softmax(-1)  # m digits
        values = torch.tensor(self.values, device=rows.device, dtype=q.dtype)
        true = values[(t.label[rows][:, None] == digits).long().argmax(1)]
        near = {
            "was": lambda: (q * (values - true[:, None]).abs()).sum(-1),
            "mse": lambda: (q @ values - true).square(),
        }
        return self.weight * near[self.loss]().mean()
