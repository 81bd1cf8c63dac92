"""FASA (2602.03152): a few rotary frequencies of a head already say which tokens its full logits would pick."""

from dataclasses import dataclass

import torch

from keeprate.check import fraction, whole
from keeprate.kv.base import ReadMethod, Step
from keeprate.kv.cache import Growing
from keeprate.method import register
from keeprate.select import Kept, keep_top


@register(kind="read-time selection", needs=("keys",), reconstructed=True)
@dataclass(frozen=True)
class FASA(ReadMethod):
    """Rank tokens by the partial logit of a head's dominant frequency chunks, then attend exactly to the best.

    The rotary embedding pairs channels i and i + d/2: q . k is the sum over these chunks. A chunk's agreement is the
    mean share of the top K by q . k that is also top K by the chunk alone; the chunks of highest agreement are
    dominant. They are calibrated on the last rows of each prompt, per KV head, and their channels are kept side by
    side so that only they are read. Rebuilt from the abstract; the paper calibrates once, offline.

    Args:
        keep: See `ReadMethod`; first and last tokens count.
        share: Share of the d/2 chunks that is dominant.
        rows: Last rows of the prompt that calibrate.
        top: K of the agreement.
        initial: First tokens that are always read.
        local: Last tokens that are always read.

    Source: FASA (2602.03152), abstract; reconstructed.
    """

    share: float = 0.25
    rows: int = 16
    top: int = 32
    initial: int = 4
    local: int = 16

    def __post_init__(self):
        super().__post_init__()
        fraction("share", self.share)
        whole("rows", self.rows)
        whole("top", self.top)
        whole("initial", self.initial, 0)
        whole("local", self.local)

    def agreement(self, step: Step) -> torch.Tensor:
        """[b, g, d/2] mean overlap of the top K by one chunk with the top K by the full logit."""
        full = step.logits(self.rows)  # b h r n
        seen = full.isfinite()
        k = min(self.top, step.n)
        best = torch.zeros_like(seen).scatter(3, full.topk(k, dim=-1).indices, True) & seen
        q = step.view.tail(self.rows).q.float()
        keys = step.view.k.float().repeat_interleave(q.shape[1] // step.groups, 1)
        half = q.shape[-1] // 2
        found = []
        for i in range(half):  # one chunk at a time: all at once would hold d/2 matrices of rows by tokens
            part = q[..., [i, i + half]] @ keys[..., [i, i + half]].transpose(-1, -2)
            part = part.masked_fill(~seen, float("-inf"))
            mine = torch.zeros_like(seen).scatter(3, part.topk(k, dim=-1).indices, True)
            found.append((mine & best).sum(-1) / best.sum(-1).clamp_min(1))
        return step.by_kv_head(torch.stack(found, -1).mean(2))

    def fold(self, step: Step) -> None:
        if step.m > 1:
            dominant = self.agreement(step).topk(max(1, int(self.share * step.view.k.shape[-1] / 2)), dim=-1).indices
            self.hold(step, dominant.sort(-1).values)

    def hold(self, step: Step, dominant: torch.Tensor) -> None:
        """Keep the channels of the dominant chunks [b, g, f] side by side."""
        step.cache.extra["dominant"] = dominant
        step.cache.extra["partial"] = Growing(self.part(step.view.k, dominant))

    @staticmethod
    def part(x: torch.Tensor, dominant: torch.Tensor) -> torch.Tensor:
        """Channels of chunks [b, g, f] of x [b, g, n, d]: [b, g, n, 2f]."""
        channels = torch.cat([dominant, dominant + x.shape[-1] // 2], -1)
        return x.gather(3, channels[:, :, None].expand(-1, -1, x.shape[2], -1))

    def choose(self, step: Step) -> Kept | None:
        held = step.cache.extra.get("partial")
        if held is None or step.n <= int(self.target(step).min()):
            return None
        dominant = step.cache.extra["dominant"]
        held.append(self.part(step.view.k[:, :, held.n :], dominant))
        q = step.view.q.unflatten(1, (step.groups, -1))[..., 0, :]  # b g r d
        partial = self.part(q, dominant).float() @ held.view.float().transpose(-1, -2)  # b g r n
        self.reads(step, held.view)
        ends = step.sinks(self.initial) | step.recent(self.local)
        return keep_top(partial.mean(2), self.target(step).expand(-1, step.groups), ends, step.valid)
