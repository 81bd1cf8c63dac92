"""What every KV-cache method is made of, and the session that runs one inside a model.

A method answers a few questions about one layer at one moment (`Step`): what does it carry from row to row (`fold`), is
a compression due (`due`), how important is every cached token (`score`), which stay anyway (`protect`), how many stay
(`counts`), and what becomes of the rest (`rest`). Methods that keep everything and read a part of it answer `choose`.
The session does the rest: cache layers, masks, positions, batches with padding, several turns, the trace.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from keeprate import select
from keeprate.anatomy import DECODERS, Decoder, decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.budget import Budget
from keeprate.check import choice, whole
from keeprate.kv.cache import Flat, KVLayer
from keeprate.kv.rope import rotate, unrotate
from keeprate.method import Method
from keeprate.score import by_kv_head
from keeprate_kernels import merge_attention, ragged_attention, selected_attention

BITS = (2, 4, 8)


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
        return (self.rank >= 0) & (self.rank < count)

    def recent(self, count: int) -> torch.Tensor:
        """[b, g, n] whether a token is one of the last `count`."""
        return self.index >= self.cache.seen - count

    def rows(self, count: int = 1) -> torch.Tensor:
        """Attention of the last `count` query rows: [b, h, count, n], at most m rows."""
        return self.view.rows(list(range(max(0, self.m - count), self.m)))

    def received(self, weight: torch.Tensor | None = None, reduce: str = "sum") -> torch.Tensor:
        """Attention every slot received from this call's real query rows: [b, h, n], see `AttentionView.received`.

        Args:
            weight: Broadcastable to [b, h, m].
            reduce: "sum" or "max".
        """
        if self.real is not None:
            there = self.real[:, None].float()
            weight = there if weight is None else weight * there
        return self.view.received(weight, reduce)

    def by_kv_head(self, x: torch.Tensor, reduce: str = "mean") -> torch.Tensor:
        """Reduce query heads to the KV heads they share: [b, h, ...] -> [b, g, ...]."""
        return by_kv_head(x, self.groups, reduce)

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

    @classmethod
    def architectures(cls) -> tuple[str, ...]:
        """Architectures that the conformance suite runs this method on."""
        return tuple(DECODERS.values())

    def check(self, body: Decoder, lengths: torch.Tensor) -> None:
        """Raise a ValueError if the method cannot work on this model or on prompts of these lengths [b]."""

    def fold(self, step: Step) -> None:
        """Carry something from this call's rows; called at every layer of every call."""

    def attend(self, step: Step) -> torch.Tensor | None:
        """The attention output [b, h, m, d] in place of the model's own kernel; None leaves it to that."""

    def __call__(
        self, model: nn.Module, *, seed: int = 0, masked: bool = False, turns: str = "first"
    ) -> "contextmanager":
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
        choice("turns", turns, ("first", "each"))
        return self._run(model, seed, masked, turns)

    @contextmanager
    def _run(self, model: nn.Module, seed: int, masked: bool, turns: str) -> Iterator["KVTrace"]:
        session = KVSession(self, decoder(model), seed, masked, turns)
        with session.attach(model):
            yield session.trace


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
        if self.budget.ragged:
            return
        stages = range(1, len(body.treated) + 1)
        if self.budget.schedule is not None and len(self.budget.schedule) != len(stages):
            raise ValueError(
                f"{self.name}: keep has {len(self.budget.schedule)} entries; the model has {len(stages)} layers to treat"
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

    def due(self, step: Step) -> bool:
        """Whether to compress this layer now."""
        if self.when == "prefill":
            return step.first
        return bool((step.cache.hot_counts > self.target(step)).any())

    def target(self, step: Step) -> torch.Tensor:
        """[b, 1] tokens that every head may hold: a keep rate is a share of all that arrived so far."""
        return self.budget.each(step.lengths, step.layer + 1)[:, None]

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
    """A method that keeps the whole cache and reads a part of it at every decode step."""

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

    def due(self, step: Step) -> bool:
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


@dataclass
class KVTrace:
    """What a `with` block did to the caches it saw.

    Attributes:
        method: How the method prints.
        kept: For every treated layer the arrival numbers [b, g, k] that its heads hold now, sorted, -1 = padding.
        read: One row per layer and decode step of a read-time method: step, layer, bytes.
    """

    method: str = ""
    layers: tuple[int, ...] = ()
    read: list[dict[str, int]] = field(default_factory=list)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)  # layer -> arrival numbers last read
    scores: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)  # layer -> [b, g, seen] at compression
    _caches: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet, repr=False)
    _last: Any = field(default=None, repr=False)

    @property
    def cache(self) -> DynamicCache:
        """The cache of the latest call.

        Raises:
            ValueError: When the model has not run yet.
        """
        if self._last is None:
            raise ValueError("no call inside the block yet")
        return self._last

    @property
    def kept(self) -> list[torch.Tensor]:
        return [self.cache.layers[i].kept() for i in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values of the treated layers."""
        return sum(self.cache.layers[i].nbytes for i in self.layers)

    @property
    def table(self) -> pd.DataFrame:
        """One row a layer: layer, seen, kept (mean over samples and heads), least, most, bytes, bookkeeping."""
        rows = []
        for i in self.layers:
            cache = self.cache.layers[i]
            counts = cache.counts.float()
            row = {"layer": i, "seen": cache.seen, "kept": counts.mean().item()}
            row |= {"least": int(counts.min()), "most": int(counts.max())}
            rows.append(row | {"bytes": cache.nbytes, "bookkeeping": cache.bookkeeping})
        return pd.DataFrame(rows)

    def note_scores(self, step: Step, scores: torch.Tensor) -> None:
        """Remember the scores [b, g, n] of a compression by arrival number; NaN = not there any more."""
        shape = (*scores.shape[:2], step.cache.seen)
        blank = torch.full(shape, float("nan"), device=scores.device)
        if step.valid is not None:
            scores = scores.masked_fill(~step.valid, float("nan"))
        self.scores[step.layer_index] = blank.scatter(2, step.index, scores)

    def note_read(self, step: Step, nbytes: int, kept: select.Kept | None = None) -> None:
        """Add to the bytes that a decode step read in a layer."""
        key = {"step": step.cache.seen, "layer": step.layer_index}
        if self.read and {k: self.read[-1][k] for k in key} == key:
            self.read[-1]["bytes"] += nbytes
        else:
            self.read.append(key | {"bytes": nbytes})
        if kept is not None:
            index = step.index.gather(2, kept.index)
            self.chosen[step.layer_index] = index if kept.valid is None else index.masked_fill(~kept.valid, -1)


_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class KVSession(Listener):
    """One method on one model: swaps the cache layers, builds masks, compresses, writes the trace."""

    def __init__(self, method: KVMethod, body: Decoder, seed: int, masked: bool, turns: str):
        self.method, self.body, self.masked, self.turns = method, body, masked, turns
        self.number = {body.attention[i]: place for place, i in enumerate(body.treated)}
        self.generator = torch.Generator().manual_seed(seed)
        self.trace = KVTrace(repr(method), body.treated)
        self.running = False
        self.replaying = False
        self.cache: Any = None
        self.waiting: list[tuple[Step, torch.Tensor]] = []

    @property
    def evicts(self) -> bool:
        return isinstance(self.method, EvictMethod)

    @property
    def reads_flat(self) -> bool:
        """Whether decode steps may attend to per-head storage as it lies, without padding it out."""
        return (
            self.evicts
            and self.method.when == "prefill"
            and not self.method.re_position
            and type(self.method).fold is KVMethod.fold
            and not torch.is_grad_enabled()
        )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Watch the decoder and its attention; undo it on leaving."""
        body = self.body.body
        if body in _active:
            raise ValueError("a KV-cache method is active on this model already; leave its with block first")
        inner = getattr(body.config, "_attn_implementation", "sdpa")
        if inner not in ("sdpa", "eager", "keeprate_sdpa", "keeprate_eager"):
            raise ValueError(f"KV-cache methods work in front of sdpa or eager attention; this model uses {inner!r}")
        hooks = [body.register_forward_pre_hook(self._before, with_kwargs=True)]
        hooks.append(body.register_forward_hook(self._after, with_kwargs=True))
        _active.add(body)
        self.running = True
        try:
            with listen(model, self, list(self.number)):
                yield
        finally:
            self.running = False
            _active.discard(body)
            for hook in hooks:
                hook.remove()

    # --- around the decoder's forward pass ----------------------------------------------------------------------------

    def _before(self, body: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.replaying:
            return args, kwargs
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None or given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError("the batch is empty; at least one token is needed")
        if embeds is not None and not bool(embeds.isfinite().all()):
            raise ValueError("inputs_embeds hold NaN or infinity")
        use_cache = kwargs.get("use_cache")
        if not (body.config.use_cache if use_cache is None else use_cache):
            raise ValueError("a KV-cache method needs the cache: call the model with use_cache=True")
        if body.training and getattr(body, "gradient_checkpointing", False):
            raise ValueError("a KV-cache method does not work under gradient checkpointing: layers would run twice")
        cache = kwargs.get("past_key_values")
        if cache is None:
            kwargs["past_key_values"] = cache = DynamicCache(config=body.config)
        self._take_over(cache)
        self.first = cache.layers[self.body.treated[0]].seen == 0
        mask = kwargs.get("attention_mask")
        lengths = torch.full((given.shape[0],), cache.get_seq_length() + given.shape[1], device=given.device)
        if mask is not None and mask.dim() == 2:
            lengths = mask.sum(1).long()
        if self.first or self.turns == "each":
            self.method.check(self.body, lengths)
        self.cache = self.trace._last = cache
        self.inputs = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}
        self.waiting = []
        return args, kwargs

    def _take_over(self, cache: Any) -> None:
        """Put our layers into the cache, in place, so that whoever made it goes on with it."""
        if type(cache) is not DynamicCache:
            raise ValueError(
                f"KV-cache methods work on a DynamicCache (what generate makes by default); got {type(cache).__name__}"
            )
        if getattr(cache, "offloading", False):
            raise ValueError("KV-cache methods do not work on an offloaded cache")
        if not cache.layers:
            cache.layers = [DynamicLayer() for _ in self.body.attention]
            cache.layer_class_to_replicate = None
        if len(cache.layers) != len(self.body.attention):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the model {len(self.body.attention)}: not made for it"
            )
        for i in self.body.treated:
            layer = cache.layers[i]
            if not isinstance(layer, KVLayer):
                if type(layer) is not DynamicLayer:
                    raise ValueError(f"layer {i} of the cache is a {type(layer).__name__}, which cannot be shortened")
                ours = KVLayer()
                if layer.get_seq_length():
                    ours.update(layer.keys, layer.values)
                    zero = torch.zeros(len(layer.keys), dtype=torch.long, device=layer.keys.device)
                    ours.extra = {"start": zero, "lengths": zero + ours.seen}
                    ours.note_positions(torch.arange(ours.seen, device=layer.keys.device)[None])
                cache.layers[i] = layer = ours
            if layer.owner is not self:
                layer.owner, layer.masked, layer.state = self, self.masked, {}
                layer.extra = {name: layer.extra[name] for name in ("start", "lengths") if name in layer.extra}

    def _after(self, body: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying or not self.evicts:
            return
        if self.first and self.method.replays:
            self._replay(body)
        if self.waiting:
            steps, scores = zip(*self.waiting, strict=True)
            if self.method.across_layers:
                counts = self.method.across(list(steps), list(scores))
            else:
                counts = [self.method.counts(step, score) for step, score in self.waiting]
            for step, score, count in zip(steps, scores, counts, strict=True):
                self._compress(step, score, count)
            self.waiting = []

    def _replay(self, body: nn.Module) -> None:
        """Read the prompt again behind itself; nothing of the second reading is kept."""
        layers = [self.cache.layers[i] for i in self.body.treated]
        mask, prompt = self.inputs["attention_mask"], self.inputs
        if mask is not None:
            mask = torch.cat([mask, mask], 1)
        others = {i: c for i, c in enumerate(self.cache.layers) if i not in self.body.treated}
        if others:
            raise ValueError(f"{self.method.name} reads the prompt twice, which layers with a sliding window cannot")
        for layer in layers:
            layer.probing = True
        self.replaying = True
        try:
            body(
                input_ids=prompt["input_ids"],
                inputs_embeds=None if prompt["input_ids"] is not None else prompt["inputs_embeds"],
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
            )
        finally:
            self.replaying = False
            for layer in layers:
                layer.probing = False
        for i in range(len(layers)):
            step, _ = self.waiting[i]
            self.waiting[i] = (step, self.method.score(step))

    # --- inside a layer -----------------------------------------------------------------------------------------------

    def _layer(self, module: nn.Module) -> KVLayer:
        return self.cache.layers[self.body.treated[self.number[module]]]

    def gather(self, module: nn.Module, view: AttentionView) -> AttentionView:
        cache = self._layer(module)
        if cache.probing:
            return view
        m = view.q.shape[2]
        if view.position_ids is None:
            raise ValueError(f"{type(module).__name__} does not hand position_ids to its attention function")
        cache.note_positions(view.position_ids)
        self.real = None
        if view.mask is not None and m > 1:
            # the last row sees every token that is not padding
            seen = _visible(view.mask)[:, 0, -1, -m:].expand(len(view.q), m)
            cache.mark_padding(seen)
            self.real = None if bool(seen.all()) else seen
        if self.real is None:
            new, begin = torch.full((len(view.q),), m, device=view.q.device), None
        else:
            new, begin = self.real.sum(1), self.real.to(torch.uint8).argmax(1)
        if "start" not in cache.extra:
            cache.extra["start"] = torch.zeros_like(new) if begin is None else begin
            cache.extra["lengths"] = torch.zeros_like(new)
        cache.extra["lengths"] = cache.extra["lengths"] + new
        if view.k.shape[2] < cache.n:  # flat storage: `attend` reads it, the kernel gets nothing to do
            return view
        if cache.touched:
            view = replace(view, mask=self._mask(cache, view), causal=False)
            if self.evicts and self.method.re_position:
                view = self._re_position(module, cache, view)
        return view

    def _mask(self, cache: KVLayer, view: AttentionView) -> torch.Tensor | None:
        """Which slots every query may see: [b, 1|h, m, n] boolean or additive, None = all."""
        m, valid = view.q.shape[2], cache.valid
        index = cache.index
        if view.mask is None:
            if m == 1 and valid is None:
                return None
            arrival = torch.arange(cache.seen - m, cache.seen, device=index.device)[:, None]
            mask = index[:, :, None] <= arrival  # b g m n
        else:
            b, g, n = index.shape
            mask = view.mask.expand(b, g, m, -1).gather(3, index[:, :, None].expand(-1, -1, m, -1))
        if valid is not None:
            hidden = ~valid[:, :, None]
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))
        return mask.repeat_interleave(view.q.shape[1] // mask.shape[1], 1)

    def _re_position(self, module: nn.Module, cache: KVLayer, view: AttentionView) -> AttentionView:
        """Rotate keys to their place in the cache and queries to theirs, head by head."""
        layer = self.body.treated[self.number[module]]
        index, old, m = cache.index, cache.positions, view.q.shape[2]
        there = torch.ones_like(index, dtype=torch.bool) if cache.valid is None else cache.valid
        place = index.masked_fill(~there, torch.iinfo(index.dtype).max).argsort(-1).argsort(-1)
        keys = rotate(unrotate(view.k, old, self.body, layer), place, self.body, layer)
        # b g m: the place of the new tokens, which are the last ones
        at = there.sum(-1, keepdim=True) - m + torch.arange(m, device=index.device)
        at = at.repeat_interleave(view.q.shape[1] // at.shape[1], 1)
        query = rotate(unrotate(view.q, view.position_ids, self.body, layer), at, self.body, layer)
        return replace(view, q=query.to(view.q.dtype), k=keys.to(view.k.dtype))

    def _step(self, module: nn.Module, view: AttentionView) -> Step:
        return Step(
            view,
            self._layer(module),
            module,
            self.body,
            self.number[module],
            len(self.number),
            self.first,
            self.real,
            self.generator,
        )

    def attend(self, module: nn.Module, view: AttentionView) -> torch.Tensor | None:
        cache = self._layer(module)
        if cache.probing:
            return None
        if view.k.shape[2] < cache.n:
            return _attend_flat(cache.flat, cache, view)
        return self.method.attend(self._step(module, view))

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        cache = self._layer(module)
        if cache.probing:
            self.method.observe(self._step(module, view))
            return
        if view.k.shape[2] < cache.n:
            return
        step = self._step(module, view)
        self.method.fold(step)
        if not self.evicts:
            return
        due = self.method.due(step) or (self.turns == "each" and self.method.when == "prefill" and step.m > 1)
        if not due:
            return
        if self.method.across_layers or (self.first and self.method.replays):
            scores = torch.empty(0) if self.method.replays and self.first else self.method.score(step)
            self.waiting.append((step, scores))
        else:
            scores = self.method.score(step)
            self._compress(step, scores, self.method.counts(step, scores))

    def _compress(self, step: Step, scores: torch.Tensor, counts: torch.Tensor) -> None:
        cache, method = step.cache, self.method
        shape = (len(step.view.k), step.groups, step.n)
        if scores.shape != shape:
            raise ValueError(f"{method.name} must give scores {shape}; got {tuple(scores.shape)}")
        if scores.dtype != torch.float32:
            raise ValueError(f"{method.name} must give scores in float32, ties decide otherwise; got {scores.dtype}")
        held = cache.hot_counts
        if bool((counts >= held).all()):
            return
        if step.m > 1:  # a decode step's would cost as much as the step
            self.trace.note_scores(step, scores)
        # what is packed already stays and takes no part
        cold, valid, protect = cache.n_cold, cache.valid, method.protect(step)
        scores = scores[..., cold:]
        valid = None if valid is None else valid[..., cold:]
        protect = None if protect is None else protect.expand(shape)[..., cold:]
        if method.rest == "drop" and not self.masked and bool((held - counts == 1).all()):
            worst = _worst(scores, protect, valid)
            if worst is not None:
                cache.drop(worst + cold)
                return
        kept = select.keep_top(scores, counts, protect, valid)
        kept = select.Kept(kept.index + cold, kept.valid)
        cache.keep(kept.index, kept.valid, () if method.rest == "drop" else (others(kept, cache, int(method.rest)),))


def _worst(scores: torch.Tensor, protect: torch.Tensor | None, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Slot [b, g] of the least score, of equal ones the latest, as a stable sort has it; None where all are protected."""
    free = scores if protect is None else scores.masked_fill(protect, float("inf"))
    free = free if valid is None else free.masked_fill(~valid, float("inf"))
    low = free.flip(-1).min(-1)
    return scores.shape[-1] - 1 - low.indices if bool(low.values.isfinite().all()) else None


def others(kept: select.Kept, cache: KVLayer, bits: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The slots that are neither kept nor packed already, as `KVLayer.keep` takes them."""
    b, g, _ = kept.index.shape
    free = torch.ones(b, g, cache.n, dtype=torch.bool, device=kept.index.device) if cache.valid is None else cache.valid
    real = torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid
    taken = torch.zeros(b, g, cache.n, dtype=torch.int8, device=free.device)
    taken.scatter_add_(2, kept.index, real.to(torch.int8))
    free = free & (taken == 0)
    free[:, :, : cache.n_cold] = False
    counts = free.sum(-1)
    most = int(counts.max())
    index = (~free).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
    there = torch.arange(most, device=free.device) < counts[..., None]
    return index, None if bool(there.all()) else there, whole("bits", bits)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """An additive or boolean mask as a boolean one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _attend_flat(flat: Flat, cache: KVLayer, view: AttentionView) -> torch.Tensor:
    """One decode step over per-head storage and the dense tokens behind it, merged by their log-sum-exp."""
    parts = [ragged_attention(view.q, flat.keys, flat.values, flat.offsets, scaling=view.scaling, return_lse=True)]
    first = 0
    for part in cache.cold:
        keys, values = part.keys.dequantise(cache.dtype), part.values.dequantise(cache.dtype)
        valid = None if cache.valid is None else cache.valid[:, :, first : first + part.n]
        parts.append(_attend_dense(view, keys, values, valid))
        first += part.n
    parts.append(_attend_dense(view, *(x.view for x in cache.dense)))
    outputs, norms = zip(*parts, strict=True)
    return merge_attention(outputs, norms)


def _attend_dense(
    view: AttentionView, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    every = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:2], -1)
    return selected_attention(view.q, keys, values, every, scaling=view.scaling, valid=valid, return_lse=True)
