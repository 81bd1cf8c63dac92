"""ZipCache (2405.14256): nothing is dropped; what matters gets 4 bits, the rest 2."""

from dataclasses import dataclass

import torch

from keeprate.check import choice, fraction, whole
from keeprate.kv.base import KVMethod, Step
from keeprate.method import register
from keeprate.select import keep_top, ragged_heads

CHUNK = 64  # probe rows held at once


@register(kind="mixed precision", needs=("attention rows",))
@dataclass(frozen=True)
class ZipCache(KVMethod):
    """Salient tokens by normalised attention of a few probe rows; keys per channel, values channel-separable per token.

    S[k] = sum over probe rows of A[q, k] / number of probe rows that can see k. Half of the probes are the last rows,
    half are random earlier ones. New tokens stay in full precision until `stream` of them are classified by the newest
    row and packed.

    Args:
        keep: Share of the tokens that is salient (a number, schedule or `Budget` as well).
        bits: Bits of salient and of other tokens: 2, 4, 8, or 16 for as they are.
        probes: Share of the prompt's rows that are probes.
        stream: Tokens between two packings while decoding.
        normalise: "visible" divides by the probe rows that see a token, the paper's rule; "causal" by all rows that
            could, n - k, as the published code; "none" not at all, the raw column sum.

    Source: ZipCache (2405.14256), normalised attention of probe rows, channel-separable token-wise quantisation.
    """

    keep: float = 0.6
    bits: tuple[int, int] = (4, 2)
    probes: float = 0.1
    stream: int = 100
    normalise: str = "visible"

    packs = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.bits, tuple | list) or len(self.bits) != 2:
            raise ValueError(f"bits must be two numbers, of salient and of other tokens; got {self.bits!r}")
        for bits in self.bits:
            choice("bits", bits, (2, 4, 8, 16))
        if self.bits[1] == 16 != self.bits[0]:
            raise ValueError(f"salient tokens cannot have fewer bits than the others; got {self.bits!r}")
        fraction("probes", self.probes)
        whole("stream", self.stream)
        choice("normalise", self.normalise, ("visible", "causal", "none"))
        if self.budget.ragged:
            raise ValueError(f"{self.name} needs a number of tokens known in advance; got keep={self.keep!r}")

    def probe_rows(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [b, r] that vote, half last and half random, and which of them count (samples differ in length)."""
        real = torch.ones(len(step.view.q), step.m, dtype=torch.bool, device=step.view.q.device)
        real = real if step.real is None else step.real
        place = real.cumsum(1) - 1  # b m: place of a row in its sample
        length = real.sum(1, keepdim=True)
        half = (length * self.probes / 2).ceil().long().clamp_min(1)
        # drawn by place, from the seed and the layer: a sample's probes depend on nothing else in the batch
        draw = torch.Generator().manual_seed(step.generator.initial_seed() * 1009 + step.layer_index)
        noise = torch.rand(step.m, generator=draw).to(place.device)[place.clamp_min(0)]
        late = place >= length - half
        noise = noise.masked_fill(late | ~real, -1.0)
        chosen = late & real | (noise.argsort(dim=1, descending=True, stable=True).argsort(1) < half) & (noise >= 0)
        rows = ragged_heads(chosen[:, None])
        index = rows.index[:, 0]
        return index, torch.ones_like(index, dtype=torch.bool) if rows.valid is None else rows.valid[:, 0]

    def score(self, step: Step) -> torch.Tensor:
        """[b, g, n] normalised attention."""
        index, counts = self.probe_rows(step)
        arrival = step.cache.seen - step.m + index  # b r
        total, seen = 0.0, 0.0
        for rows, real, at in zip(index.split(CHUNK, 1), counts.split(CHUNK, 1), arrival.split(CHUNK, 1), strict=True):
            weight = real[:, None, :, None].float()
            total = total + (step.by_kv_head(step.view.rows(rows), "sum") * weight).sum(2)
            visible = step.index[:, :, None] <= at[:, None, :, None]
            seen = seen + (visible * weight).sum(2)
        if self.normalise == "none":
            return total
        if self.normalise == "causal":
            return total / (step.cache.seen - step.index).float()
        return total / seen.clamp_min(1)

    def fold(self, step: Step) -> None:
        cache = step.cache
        packed = cache.extra.get("packed", 0)  # tokens that arrived before are classified already
        if not (step.first or cache.seen - packed >= self.stream) or tuple(self.bits) == (16, 16):
            return
        new = step.index >= packed
        new = new if step.valid is None else new & step.valid
        share = self.budget.each(new[:, 0].sum(-1), step.layer + 1)[:, None].expand(-1, step.groups)
        salient = keep_top(self.score(step), share, None, new).mask(step.n)
        stay = torch.arange(step.n, device=new.device) >= cache.n_cold
        stay = (stay if step.valid is None else stay & step.valid) & ~new
        parts = []
        for tokens, bits in ((salient, self.bits[0]), (new & ~salient, self.bits[1])):
            if bits == 16:
                stay = stay | tokens
            elif bool(tokens.any()):
                some = ragged_heads(tokens)
                parts.append((some.index, some.valid, bits))
        hot = ragged_heads(stay)
        cache.keep(hot.index, hot.valid, tuple(parts))
        cache.extra["packed"] = cache.seen
