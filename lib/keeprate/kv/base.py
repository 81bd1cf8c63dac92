"""What every KV-cache method is made of.

A method answers a few questions about one layer at one moment (`Step`): what does it carry from row to row (`fold`), is
a compression due (`due`), how important is every cached token (`score`), which stay anyway (`protect`), how many stay
(`counts`), and what becomes of the rest (`rest`). Methods that keep everything and read a part of it answer `choose`.
The session (session.py) does the rest: cache layers, masks, positions, padding, several turns, the trace.
"""

from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from keeprate import select
from keeprate.anatomy import DECODERS, Decoder, decoder
from keeprate.attention import AttentionView
from keeprate.budget import Budget
from keeprate.check import choice
from keeprate.kv.cache import KVLayer
from keeprate.kv.rope import unrotate
from keeprate.method import Method
from keeprate.score import by_kv_head
from keeprate_kernels import selected_attention

if TYPE_CHECKING:
    from keeprate.kv.session import KVTrace

BITS = (2, 4, 8)
PACK = 64  # tokens over the budget before a decode step packs them


@dataclass
class Step:
    """One layer just before (`choose`) or just after (everything else) it attends.

    Attributes:
        view: q [b, h, m, d], k and v [b, g, n, d] of all cached tokens, the mask in use; `rows` and `received` give
            attention probabilities on demand.
        cache: The layer's cache: `index`, `valid`, `positions`, `carry`, `extra`.
        module: The attention module.
        decoder: The model's anatomy.
        layer: Number of the layer among those treated, from 0.
        depth: How many are treated.
        first: Whether this call filled an empty cache (the prompt).
        real: [b, m] which of the new tokens are real; None = all.
        ids: [b, m] the new tokens; None when the model was given embeddings.
        common: Shared by all layers of this call: what one layer decides and another one uses.
        generator: The method's own source of chance.
    """

    view: AttentionView
    cache: KVLayer
    module: nn.Module
    decoder: Decoder
    layer: int
    depth: int
    first: bool
    real: torch.Tensor | None
    ids: torch.Tensor | None
    common: dict[str, Any]
    generator: torch.Generator

    @property
    def m(self) -> int:
        """Number of new tokens, which are the query rows."""
        return self.view.q.shape[2]

    @property
    def n(self) -> int:
        """Number of slots."""
        return self.view.k.shape[2]

    @property
    def groups(self) -> int:
        """Number of KV heads g."""
        return self.view.k.shape[1]

    @property
    def index(self) -> torch.Tensor:
        """[b, g, n] arrival number of the token in every slot."""
        return self.cache.index

    @property
    def valid(self) -> torch.Tensor | None:
        """[b, g, n] slots that hold a token; None = all."""
        return self.cache.valid

    @property
    def start(self) -> torch.Tensor:
        """[b, 1, 1] arrival number of every sample's first real token (left padding comes before it)."""
        return self.cache.extra["start"][:, None, None]

    @property
    def rank(self) -> torch.Tensor:
        """[b, g, n] place of every token in its sample, padding not counted: 0 is the first real token."""
        return self.index - self.start

    @property
    def lengths(self) -> torch.Tensor:
        """[b] real tokens that arrived so far."""
        return self.cache.extra["lengths"]

    def sinks(self, count: int) -> torch.Tensor:
        """[b, g, n] whether a token is one of the first `count`."""
        if self.cache.extra["aligned"]:  # every sample begins with the first arrival
            return self.index < count
        rank = self.rank
        return (rank >= 0) & (rank < count)

    def recent(self, count: int) -> torch.Tensor:
        """[b, g, n] whether a token is one of the last `count`."""
        return self.index >= self.cache.seen - count

    def rows(self, count: int = 1) -> torch.Tensor:
        """Attention of the last `count` query rows: [b, h, count, n], at most m rows."""
        return self.view.tail(count).probs()

    def logits(self, count: int = 1) -> torch.Tensor:
        """Scaled logits of the last `count` query rows, -inf where hidden: [b, h, count, n] in fp32."""
        view = self.view.tail(count)
        q = view.q.float().unflatten(1, (self.groups, -1)).flatten(2, 3)  # b g (h/g count) d
        logits = (q @ view.k.float().transpose(-1, -2)).unflatten(2, (-1, view.q.shape[2])).flatten(1, 2)
        logits, mask = logits * view.scaling, view.whole_mask()
        if mask is None:
            return logits
        return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()

    def received(self, weight: torch.Tensor | None = None, reduce: str = "sum") -> torch.Tensor:
        """Attention every slot received from this call's real query rows: [b, h, n], see `AttentionView.received`.

        Args:
            weight: Broadcastable to [b, h, m].
            reduce: "sum" or "max".
        """
        if self.m == 1 and weight is None:
            return self.view.probs()[:, :, 0]
        if self.real is not None:
            there = self.real[:, None].float()
            weight = there if weight is None else weight * there
        return self.view.received(weight, reduce)

    def by_kv_head(self, x: torch.Tensor, reduce: str = "mean") -> torch.Tensor:
        """Reduce query heads to the KV heads they share: [b, h, ...] -> [b, g, ...]."""
        return by_kv_head(x, self.groups, reduce)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over KV heads of what each gives the same token, 0 from a head that lost it: [b, g, n] -> same."""
        if not self.cache.touched:
            return x.mean(1, keepdim=True).expand_as(x)
        index = self.index.flatten(1)
        x = x if self.valid is None else x.masked_fill(~self.valid, 0.0)
        total = x.new_zeros(len(x), self.cache.seen).scatter_add(1, index, x.flatten(1))
        return (total / self.groups).gather(1, index).view_as(x)

    def plain_queries(self) -> torch.Tensor:
        """Queries before the rotary embedding, [b, h, m, d] in fp32."""
        return unrotate(self.view.q, self.view.position_ids, self.decoder, self.layer_index)

    @property
    def layer_index(self) -> int:
        """Number of the layer in the model, from 0."""
        return self.decoder.treated[self.layer]


@dataclass(frozen=True)
class KVMethod(Method):
    """Base of all KV-cache methods. Calling it on a model gives the context manager.

    Args:
        keep: Share of the tokens that stays readable, a number of tokens, one entry per layer, or a `Budget`.
    """

    family: ClassVar[str] = "kv"

    keep: float | int | tuple | Budget = 0.25

    def __post_init__(self):
        Budget.of(self.keep)

    @property
    def budget(self) -> Budget:
        """`keep` as a Budget."""
        return Budget.of(self.keep)

    @property
    def packs(self) -> bool:
        """Whether some tokens are kept in another form instead of being dropped."""
        return getattr(self, "rest", "drop") != "drop"

    @classmethod
    def architectures(cls) -> tuple[str, ...]:
        """Architectures that the conformance suite runs this method on."""
        return tuple(DECODERS.values())

    def target(self, step: Step) -> torch.Tensor:
        """[b, 1] tokens that every head may hold, or read: a keep rate is a share of all that arrived so far."""
        budget = self.budget
        key = ("target", budget, 1 if budget.schedule is None else step.layer + 1)
        if key not in step.common:  # all layers have seen as many tokens
            step.common[key] = budget.each(step.lengths, key[2])[:, None]
        return step.common[key]

    def check(self, body: Decoder, lengths: torch.Tensor) -> None:
        """Raise a ValueError if the method cannot work on this model or on prompts of these lengths [b]."""

    def fold(self, step: Step) -> None:
        """Carry something from this call's rows; called at every layer of every call."""

    def attend(self, step: Step) -> torch.Tensor | None:
        """The attention output [b, h, m, d] in place of the model's own kernel; None leaves it to that."""

    def __call__(
        self, model: nn.Module, *, seed: int = 0, masked: bool = False, turns: str = "first"
    ) -> "AbstractContextManager[KVTrace]":
        """Run the model with this method inside a `with` block.

        Args:
            model: A causal language model of transformers. It is untouched before and after.
            seed: Of the method's own random numbers; torch's global state is not used.
            masked: Hide dropped tokens behind a mask instead of removing them: slower, the same result, for tests.
            turns: "first": a method that compresses after prefill does so once, after the call that fills an empty
                cache. "each": after every call with more than one new token.

        Returns:
            Context manager that gives a `KVTrace`.

        Raises:
            ValueError: On an unsupported model, a method active already; inside the block on a cache it cannot treat
                or a budget smaller than what the method protects, before the model runs.

        Example:
            >>> with kr.kv.SnapKV(keep=0.25)(llm.model) as trace:   # doctest: +SKIP
            ...     llm.model.generate(**prompt)
        """
        from keeprate.kv.session import KVSession

        choice("turns", turns, ("first", "each"))
        if masked and self.packs:
            raise ValueError(f"{self!r} packs tokens, which are neither dropped nor hidden: masked=True has no meaning")
        return KVSession(self, decoder(model), seed, masked, turns).attach(model)


@dataclass(frozen=True)
class EvictMethod(KVMethod):
    """A method that removes tokens from the cache, or keeps them in fewer bits.

    Args:
        keep: See `KVMethod`.
        rest: What becomes of the others: "drop", or 2, 4 or 8 bits each.
        re_position: Attend as if the survivors stood next to each other: keys and queries are re-rotated to their
            place in the cache. By default survivors keep their original positions.
    """

    when: ClassVar[str] = "prefill"  # "prefill": once, after the prompt; "decode": whenever there are too many
    across_layers: ClassVar[bool] = False  # decide when the scores of all layers are known (`across`)
    replays: ClassVar[bool] = False  # read the prompt a second time, with `observe` watching, before scoring

    _: KW_ONLY
    rest: str | int = "drop"
    re_position: bool = False

    def __post_init__(self):
        super().__post_init__()
        choice("rest", self.rest, ("drop", *BITS))
        tokens, least = self.budget.tokens, self.protected()
        if tokens is not None and tokens < least:
            raise ValueError(f"{self.name} always keeps {least} tokens; got a budget of {tokens}")

    def protected(self) -> int:
        """Number of tokens that stay whatever their score (sinks, recent window)."""
        return 0

    def check(self, body: Decoder, lengths: torch.Tensor) -> None:
        if self.replays and len(body.treated) < len(body.attention):
            raise ValueError(f"{self.name} reads the prompt twice, which layers with a sliding window cannot")
        if self.budget.ragged:
            return
        stages = range(1, len(body.treated) + 1)
        if self.budget.schedule is not None and len(self.budget.schedule) != len(stages):
            raise ValueError(
                f"{self.name}: keep has {len(self.budget.schedule)} entries; the model has {len(stages)} treated layers"
            )
        for stage in stages:
            counts = self.budget.each(lengths, stage)
            short = (counts < lengths) & (counts < self.protected())
            if bool(short.any()):
                i = int(short.nonzero()[0])
                raise ValueError(
                    f"{self.name} always keeps {self.protected()} tokens; keep={self.keep!r} of a prompt of "
                    f"{int(lengths[i])} leaves {int(counts[i])}"
                )
            if self.budget.schedule is None:
                break

    def due(self, step: Step) -> torch.Tensor:
        """[b] which samples to compress in this layer now."""
        if self.when == "prefill":
            return torch.full((len(step.view.k),), step.first, device=step.view.k.device)
        # packed tokens share statistics, so they are packed by the block
        most = self.target(step) + (0 if self.rest == "drop" or step.first else PACK - 1)
        return (step.cache.hot_counts > most).any(1)

    def score(self, step: Step) -> torch.Tensor:
        """Importance of every cached token, [b, g, n] in fp32, higher = keep; what `valid` excludes may be anything."""
        raise NotImplementedError(f"{self.name} does not say how it scores")

    def protect(self, step: Step) -> torch.Tensor | None:
        """Slots that stay whatever their score, broadcastable to [b, g, n]; None = none."""

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        """[b, g] tokens that every head keeps."""
        if self.budget.ragged:
            present = scores if step.valid is None else scores.masked_fill(~step.valid, float("-inf"))
            return self.budget.counts(present)
        return self.target(step).expand(-1, scores.shape[1])

    def across(self, steps: list[Step], scores: list[torch.Tensor]) -> list[torch.Tensor]:
        """[b, g] tokens to keep for every layer at once, where `across_layers` is set."""
        raise NotImplementedError(f"{self.name} does not say how it divides a budget among layers")

    def observe(self, step: Step) -> None:
        """Watch a second reading of the prompt, where `replays` is set: the view's keys are prompt, then replay."""


@dataclass(frozen=True)
class ReadMethod(KVMethod):
    """A method that keeps the whole cache and reads a part of it at every decode step.

    Args:
        keep: How many tokens a head reads: see `KVMethod`.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.budget.ragged:
            raise ValueError(f"{self.name} needs a number of tokens known in advance; got keep={self.keep!r}")

    def choose(self, step: Step) -> select.Kept | None:
        """Slots to read now, index [b, g, k]; None = read everything."""
        raise NotImplementedError(f"{self.name} does not say what it reads")

    def attend(self, step: Step) -> torch.Tensor | None:
        if step.m > 1:
            return None
        kept = self.choose(step)
        view, trace = step.view, step.cache.owner.trace
        per_token = 2 * view.k.element_size() * view.k.shape[-1]
        if kept is None:
            trace.note_read(step, step.n * step.groups * len(view.k) * per_token)
            return None
        valid = kept.valid
        if step.valid is not None:
            there = step.valid.gather(2, kept.index)
            valid = there if valid is None else valid & there
        trace.note_read(step, kept.index.numel() * per_token, kept)
        if step.cache.masked:
            hidden = ~select.Kept(kept.index, valid).mask(step.n)
            hidden = hidden.repeat_interleave(view.q.shape[1] // step.groups, 1)[:, :, None]
            weight = step.logits(1).masked_fill(hidden, float("-inf")).softmax(-1)
            return (weight @ view.v.float().repeat_interleave(hidden.shape[1] // step.groups, 1)).to(view.q.dtype)
        return selected_attention(view.q, view.k, view.v, kept.index, scaling=view.scaling, valid=valid)

    def reads(self, step: Step, *tensors: torch.Tensor) -> None:
        """Count the bytes of what was read to decide (page bounds, partial keys), beside the keys and values."""
        step.cache.owner.trace.note_read(step, sum(x.numel() * x.element_size() for x in tensors))


@dataclass(frozen=True)
class Modifier(EvictMethod):
    """A method around another one, which it changes in one place and follows in all others.

    Args:
        base: The method that is changed.
        keep: Replaces the base's budget when given.
    """

    keep: float | int | tuple | Budget | None = None
    base: EvictMethod | None = None

    def __post_init__(self):
        base = self.default() if self.base is None else self.base
        if not isinstance(base, EvictMethod):
            raise ValueError(f"{self.name} needs a method that evicts tokens as base; got {base!r}")
        if self.keep is None:
            object.__setattr__(self, "keep", base.keep)
        object.__setattr__(self, "base", replace(base, keep=self.keep, rest=self.rest, re_position=self.re_position))
        super().__post_init__()

    @classmethod
    def default(cls) -> EvictMethod:
        """The base when none is given."""
        raise NotImplementedError(f"{cls.__name__} needs a base")

    @property
    def when(self) -> str:
        return self.base.when

    @property
    def across_layers(self) -> bool:
        return self.base.across_layers

    @property
    def replays(self) -> bool:
        return self.base.replays

    def protected(self) -> int:
        return self.base.protected()

    def fold(self, step: Step) -> None:
        self.base.fold(step)

    def observe(self, step: Step) -> None:
        self.base.observe(step)

    def due(self, step: Step) -> torch.Tensor:
        return self.base.due(step)

    def target(self, step: Step) -> torch.Tensor:
        return self.base.target(step)

    def score(self, step: Step) -> torch.Tensor:
        return self.base.score(step)

    def protect(self, step: Step) -> torch.Tensor | None:
        return self.base.protect(step)

    def counts(self, step: Step, scores: torch.Tensor) -> torch.Tensor:
        return self.base.counts(step, scores)

    def across(self, steps: list[Step], scores: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.base.across(steps, scores)
