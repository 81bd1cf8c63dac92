"""ActQKV (2502.13542): probe the cache with the queries that stand out, and read the blocks they point at."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate.check import whole
from keeprate.kv.base import ReadMethod, Step
from keeprate.kv.blocks import Blocks, remembered
from keeprate.method import register
from keeprate.select import Kept, ragged_heads


@register(kind="read-time selection", needs=("queries", "keys", "received attention"))
@dataclass(frozen=True)
class ActQKV(ReadMethod):
    """A probe query, weighted by how unusual each recent query is, against the mean of each block's most attended keys.

    With the running mean mu and variance var of the queries (all heads side by side), a query's activation bias is
    delta = mean_d (q - mu)^2 / (var + mean(var) / 100), and the probe is sum_i q_i delta_i / sum delta over the last
    `window` queries. Blocks are ranked by the cosine between probe and block key. All heads of a layer read the same
    blocks. `adaptive` lets the number of blocks follow the entropy of softmax(scores), as the paper does; the paper's
    second factor, a layer's share of the variance between layers, is left out, and so is the authors' term for a
    question that is known. Only the prompt's attention says which keys represent a block; a block of generated tokens
    takes its first ones.

    Args:
        keep: See `ReadMethod`; first and last tokens count.
        block: Tokens a block.
        representatives: Most attended keys of a block whose mean is the block key.
        window: Recent queries that make the probe.
        initial: First tokens that are always read.
        local: Last tokens that are always read.
        least: Fewest blocks.
        adaptive: Scale the number of blocks by twice the normalised entropy, at most to the budget.

    Source: ActQKV (2502.13542), probe query; the authors' defaults are 64 first and 512 last tokens.
    """

    block: int = 32
    representatives: int = 4
    window: int = 32
    initial: int = 64
    local: int = 512
    least: int = 6
    adaptive: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("block", "representatives", "window", "local", "least"):
            whole(name, getattr(self, name))
        whole("initial", self.initial, 0)

    def fold(self, step: Step) -> None:
        extra, q = step.cache.extra, step.view.q.transpose(1, 2).flatten(2).float()  # b m h*d
        there = torch.ones(q.shape[:2], device=q.device) if step.real is None else step.real.float()
        there = there[..., None]
        count, total, square, recent, real = extra.get("queries", (0.0, 0.0, 0.0, q[:, :0], there[:, :0]))
        extra["queries"] = (
            count + there.sum(1),
            total + (q * there).sum(1),
            square + (q.square() * there).sum(1),
            torch.cat([recent, q], 1)[:, -self.window :],
            torch.cat([real, there], 1)[:, -self.window :],
        )
        if step.m > 1:  # attention within the call decides which keys speak for their block
            step.cache.carry("received").add_(step.by_kv_head(step.received()))

    def probe(self, step: Step) -> torch.Tensor:
        """[b, h*d] the weighted query."""
        count, total, square, recent, real = step.cache.extra["queries"]
        now = step.view.q.transpose(1, 2).flatten(2).float()
        recent = torch.cat([recent, now], 1)[:, -self.window :]
        real = torch.cat([real, torch.ones_like(now[..., :1])], 1)[:, -self.window :]
        mean = total / count
        var = (square / count - mean.square()).clamp_min(0.0)
        gap = (recent - mean[:, None]).square() / (var + var.mean(-1, keepdim=True) / 100).clamp_min(1e-12)[:, None]
        delta = gap.mean(-1) * real[..., 0]
        return ((delta / delta.sum(1, keepdim=True).clamp_min(1e-12))[..., None] * recent).sum(1)

    def keys(self, step: Step, blocks: Blocks) -> torch.Tensor:
        """[b, c, g*d] mean of every full block's representative keys, KV heads side by side."""

        def compute(first: int) -> tuple[torch.Tensor]:
            keys = blocks.take(step.view.k.float(), first)  # b g c t d
            weight = blocks.take(step.cache.carry("received"), first).mean(1)  # b c t
            speak = weight.topk(min(self.representatives, self.block), dim=-1).indices
            speak = speak[:, None, ..., None].expand(-1, keys.shape[1], -1, -1, keys.shape[-1])
            return (keys.gather(3, speak).mean(3),)

        return remembered(step, "block keys", blocks, compute)[0].transpose(1, 2).flatten(2)

    def choose(self, step: Step) -> Kept | None:
        count, blocks = self.target(step), Blocks.of(step, self.block)
        many = blocks.full.sum(1)  # b
        if step.n <= int(count.min()) or not int(many.max()) or "queries" not in step.cache.extra:
            return None
        keys = self.keys(step, blocks)
        self.reads(step, keys)
        probe = self.probe(step).unflatten(1, (step.groups, -1, step.view.q.shape[-1])).mean(2).flatten(1)
        scores = F.cosine_similarity(probe[:, None], keys, dim=-1).masked_fill(~blocks.full, float("-inf"))  # b c
        ends = (step.sinks(self.initial) | step.recent(self.local))[:, :1]
        room = (count[:, 0] - ends.sum((1, 2))).clamp_min(0) // self.block
        if self.adaptive:
            share = scores.softmax(-1)
            entropy = -(share * share.clamp_min(1e-12).log()).sum(-1) / many.clamp_min(2).log()
            room = torch.minimum(room, (room * 2 * entropy).round().long().clamp_min(self.least))
        best = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1) < room[:, None]
        kept = ragged_heads(blocks.tokens(best[:, None]) & ~blocks.tail[:, None] | ends)
        shape = (-1, step.groups, -1)
        return Kept(kept.index.expand(shape), None if kept.valid is None else kept.valid.expand(shape))
