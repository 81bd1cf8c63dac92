"""CT (2205.02517): the target should beat what has just been said."""

from dataclasses import dataclass

import torch

from keeprate.check import fraction, number
from keeprate.method import register
from keeprate.sft.base import SFTMethod
from keeprate.sft.tokens import Tokens


@register(kind="auxiliary loss", needs=("logits of earlier tokens",))
@dataclass(frozen=True)
class CT(SFTMethod):
    """Plain fine-tuning plus, for the first tokens of every sequence,

        log(1 + sum_{j in N_t} exp(z[t, j] - z[t, y_t]))

    with N_t the window of targets before t, except those equal to y_t. A token that stands in the window twice counts
    twice. The mean over these positions is added to the loss, times `weight`; where gradients are accumulated, a
    micro-batch's mean counts by its share of the denominator.

    Args:
        length: Share of a sequence's targets that take part, from its beginning.
        window: Size of the window as a share of that length.
        weight: Of the contrastive loss.
        denominator: See `SFTMethod`.

    Source: Contrastive token loss (2205.02517); a quarter of the sequence and half of that as a window.
    """

    length: float = 0.25
    window: float = 0.5
    weight: float = 1.0

    def __post_init__(self):
        fraction("length", self.length)
        fraction("window", self.window)
        number("weight", self.weight, 0)
        super().__post_init__()

    def weigh(self, t: Tokens) -> torch.Tensor:
        return torch.ones_like(t.nll)

    def extra(self, t: Tokens) -> torch.Tensor | None:
        if self.weight == 0:
            return None
        lengths = (t.sizes * self.length + 1e-6).long().clamp_min(1)  # [s]
        window = (lengths * self.window + 1e-6).long().clamp_min(1)
        step = torch.arange(int(lengths.max()), device=lengths.device)
        there = step < lengths[:, None]  # s m
        index = (t.sizes.cumsum(0) - t.sizes)[:, None] + torch.where(there, step, 0)
        label = t.label[index]
        logits = t.head.blocks(index, label)  # s m m: row t, entry y_j
        gap = logits - logits.diagonal(dim1=1, dim2=2)[..., None]
        back = step[:, None] - step  # how far j stands before t
        near = (back > 0) & (back <= window[:, None, None]) & there[:, None]
        gap = gap.masked_fill(~(near & (label[:, :, None] != label[:, None])), -torch.inf)
        # log(1 + sum exp) with the 1 as one more entry
        found = torch.cat((torch.zeros_like(gap[..., :1]), gap), -1).logsumexp(-1)
        return self.weight * found[there].mean()
