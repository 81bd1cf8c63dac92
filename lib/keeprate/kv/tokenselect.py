"""TokenSelect (2411.02886): all heads of a layer vote for the tokens to read, and a similar query reuses the vote."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate.check import number, whole
from keeprate.kv.base import ReadMethod, Step
from keeprate.method import register
from keeprate.select import Kept, keep_top


@register(kind="read-time selection", needs=("attention logits",))
@dataclass(frozen=True)
class TokenSelect(ReadMethod):
    """Soft vote S[k] = sum over heads of softmax(q . k) over the middle tokens; the best, the first and the last ones.

    The choice of the previous step is used again while the query points the same way: cos(q, q at the last choice)
    >= `similarity`. Choosing reads all keys, reusing none, which the table of bytes shows. The prompt is read in full;
    the paper also selects for each of its chunks and moves the chosen tokens together, to go beyond the trained length.

    Args:
        keep: See `ReadMethod`; first and last tokens count.
        initial: First tokens that are always read.
        local: Last tokens that are always read.
        similarity: Threshold of reuse; -1 never chooses again, above 1 always does.
        vote: "soft" (the paper's), "hard" (how many heads have it among their best) or "logits" (their sum).

    Source: TokenSelect (2411.02886), head soft vote; authors' defaults: 128 first, 512 last and 2,048 tokens between.
    """

    initial: int = 128
    local: int = 512
    similarity: float = 0.9
    vote: str = "soft"

    def __post_init__(self):
        super().__post_init__()
        whole("initial", self.initial, 0)
        whole("local", self.local)
        number("similarity", self.similarity)
        if self.vote not in ("soft", "hard", "logits"):
            raise ValueError(f"vote must be 'soft', 'hard' or 'logits'; got {self.vote!r}")

    def votes(self, step: Step, middle: torch.Tensor) -> torch.Tensor:
        """[b, n] what all heads together give the middle tokens [b, 1, n]."""
        logits = step.logits(1)[:, :, 0]
        hidden = logits.masked_fill(~middle, float("-inf"))
        if self.vote == "logits":
            return logits.masked_fill(~middle, 0.0).sum(1)
        if self.vote == "soft":
            return hidden.softmax(-1).nan_to_num(0.0).sum(1)
        free = (self.target(step) - self.initial - self.local).clamp_min(1)[..., None]  # b 1 1
        best = hidden.argsort(dim=-1, descending=True, stable=True).argsort(-1) < free
        return (best & middle).float().sum(1)

    def choose(self, step: Step) -> Kept | None:
        count = self.target(step)
        if step.n <= int(count.min()):
            return None
        ends = (step.sinks(self.initial) | step.recent(self.local))[:, :1]
        middle = ~ends if step.valid is None else ~ends & step.valid[:, :1]
        query, held = step.view.q[:, :, 0].flatten(1).float(), step.cache.extra.get("vote")
        again = torch.ones(len(query), dtype=torch.bool, device=query.device)
        if held is not None:
            again = F.cosine_similarity(query, held[0], dim=-1) < self.similarity
        if held is None or bool(again.any()):
            votes = self.votes(step, middle)
            self.reads(step, step.view.k)
            if held is not None:  # tokens that came since have no vote yet
                old = F.pad(held[1], (0, step.n - held[1].shape[1]))
                votes = torch.where(again[:, None], votes, old)
                query = torch.where(again[:, None], query, held[0])
            step.cache.extra["vote"] = held = query, votes
        votes = F.pad(held[1], (0, step.n - held[1].shape[1]))
        valid = None if step.valid is None else step.valid[:, :1]
        kept = keep_top(votes[:, None], count, ends, valid)
        shape = (-1, step.groups, -1)
        return Kept(kept.index.expand(shape), None if kept.valid is None else kept.valid.expand(shape))
