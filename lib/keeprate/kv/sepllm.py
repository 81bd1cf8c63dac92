"""SepLLM (2412.12094): what a segment says is condensed into the separator that ends it."""

from dataclasses import dataclass
from typing import Any

import torch

from keeprate.check import whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register

MARKS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")


@register(kind="eviction", needs=("token ids",))
@dataclass(frozen=True)
class SepLLM(EvictMethod):
    """Keep the first tokens, the newest separators and as many of the last tokens as fit.

    Without separators this is StreamingLLM. The paper also masks the prompt this way and trains with that mask; here
    the prompt is read in full and the cache shortened after it, which is its training-free streaming use.

    Args:
        keep: See `EvictMethod`.
        separators: Token ids of the separators; `SepLLM.of(tokenizer)` finds them.
        initial: First tokens that stay.
        most: Separators kept at most beside the window, the newest ones; None = half of the budget. The paper keeps 64
            or 128 of them and a window of 256.

    Source: SepLLM (2412.12094), whose separators are . , ? ! ; : space, tab and newline.
    """

    when = "decode"

    separators: tuple[int, ...] = ()
    initial: int = 4
    most: int | None = None

    def __post_init__(self):
        whole("initial", self.initial, 0)
        if self.most is not None:
            whole("most", self.most, 0)
        super().__post_init__()

    @classmethod
    def of(cls, tokenizer: Any, **params: Any) -> "SepLLM":
        """With the ids of all tokens of a tokenizer that are a separator, with or without space around it."""
        ids = range(len(tokenizer))
        text = tokenizer.batch_decode([[i] for i in ids])
        special = set(tokenizer.all_special_ids)
        found = [
            i for i, t in zip(ids, text, strict=True) if i not in special and t and (t in MARKS or t.strip() in MARKS)
        ]
        return cls(separators=tuple(found), **params)

    def protected(self) -> int:
        return self.initial

    def protect(self, step: Step) -> torch.Tensor:
        return step.sinks(self.initial)

    def fold(self, step: Step) -> None:
        if not self.separators:
            return
        if step.ids is None:
            raise ValueError("SepLLM looks at token ids; the model was given inputs_embeds")
        marks = torch.tensor(self.separators, device=step.ids.device)
        is_mark = torch.isin(step.ids, marks)[:, None].expand(-1, step.groups, -1)
        # the new tokens stand in the last slots
        step.cache.carry("separator", dtype=torch.bool)[:, :, -step.m :] = is_mark

    def score(self, step: Step) -> torch.Tensor:
        arrival = step.index.float()
        if not self.separators:
            return arrival
        mark = step.cache.carry("separator", dtype=torch.bool)
        mark = mark if step.valid is None else mark & step.valid
        room = self.target(step)
        most = room // 2 if self.most is None else torch.full_like(room, self.most)
        window = (room - self.initial - most).clamp_min(0)[..., None]
        # separators within the window are there anyway
        old = mark & (step.index < step.cache.seen - window)
        newest = arrival.masked_fill(~old, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return torch.where(old & (newest < most[..., None]), arrival + step.cache.seen, arrival)
