"""The session: one KV-cache method at work inside a model, and the record of what it did."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from keeprate import select
from keeprate.anatomy import Decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.kv.base import EvictMethod, KVMethod, Modifier, Step
from keeprate.kv.cache import Flat, KVLayer, take_over
from keeprate.kv.rope import rotate, unrotate
from keeprate_kernels import merge_attention, ragged_attention, selected_attention


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
    """One method on one model: swaps the cache layers, builds masks, compresses, writes the trace.

    Attributes:
        flat_anywhere: Attend to per-head storage as it lies on a CPU too, where a padded copy is the faster way.
    """

    flat_anywhere = False

    def __init__(self, method: KVMethod, body: Decoder, seed: int, masked: bool, turns: str):
        self.method, self.body, self.masked, self.turns = method, body, masked, turns
        self.number = {body.attention[i]: place for place, i in enumerate(body.treated)}
        self.evicts = isinstance(method, EvictMethod)
        chain = [method]
        while isinstance(chain[-1], Modifier):
            chain.append(chain[-1].base)
        self.attends = type(method).attend is not KVMethod.attend
        # nothing to do at a decode step
        self.idle = self.evicts and method.when == "prefill" and type(chain[-1]).fold is KVMethod.fold
        # at a decode step every head holds its plain budget, and one more token
        self.steady = self.evicts and method.when == "decode" and not method.packs and not method.budget.ragged
        if self.steady:
            own = {getattr(type(part), name) for part in chain for name in ("due", "counts", "target")}
            plain = {getattr(cls, name) for name in ("due", "counts", "target") for cls in (EvictMethod, Modifier)}
            self.steady = own <= plain and not masked
        self.generator = torch.Generator().manual_seed(seed)
        self.trace = KVTrace(repr(method), body.treated)
        self.common: dict[str, Any] = {}
        self.running = False
        self.replaying = False
        self.cache: Any = None
        self.waiting: list[tuple[Step, torch.Tensor, torch.Tensor]] = []

    @property
    def reads_flat(self) -> bool:
        """Whether decode steps may attend to per-head storage as it lies, without padding it out."""
        device = self.cache.layers[self.body.treated[0]].device
        useful = self.flat_anywhere or device.type == "cuda"
        return useful and self.idle and not self.method.re_position and not torch.is_grad_enabled()

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[KVTrace]:
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
                yield self.trace
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
        self.waiting, self.common = [], {}
        return args, kwargs

    def _take_over(self, cache: Any) -> None:
        """Put our layers into the cache and make them this session's."""
        for layer in take_over(cache, len(self.body.attention), self.body.treated, owner=self):
            if layer.seen and "start" not in layer.extra:
                zero = torch.zeros(layer.batch, dtype=torch.long, device=layer.device)
                layer.extra = {"start": zero, "aligned": True, "lengths": zero + layer.seen}
                layer.note_positions(torch.arange(layer.seen, device=layer.device)[None])
            if layer.owner is not self:
                layer.owner, layer.masked, layer.state = self, self.masked, {}
                layer.extra = {
                    name: layer.extra[name] for name in ("start", "aligned", "lengths") if name in layer.extra
                }

    def _after(self, body: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying or not self.evicts:
            return
        if self.first and self.method.replays:
            self._replay(body)
        if self.waiting:
            steps, scores, due = zip(*self.waiting, strict=True)
            if self.method.across_layers:
                counts = self.method.across(list(steps), list(scores))
            else:
                counts = [self.method.counts(step, score) for step, score in zip(steps, scores, strict=True)]
            for parts in zip(steps, scores, counts, due, strict=True):
                self._compress(*parts)
            self.waiting = []

    def _replay(self, body: nn.Module) -> None:
        """Read the prompt again behind itself; nothing of the second reading is kept."""
        layers = [self.cache.layers[i] for i in self.body.treated]
        mask, prompt = self.inputs["attention_mask"], self.inputs
        positions = torch.arange(layers[0].last, device=layers[0].device)[None]
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            mask = torch.cat([mask, mask], 1)
        positions = positions + layers[0].extra["lengths"][:, None]
        for layer in layers:
            layer.probing = True
        self.replaying = True
        try:
            body(
                input_ids=prompt["input_ids"],
                inputs_embeds=None if prompt["input_ids"] is not None else prompt["inputs_embeds"],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        finally:
            self.replaying = False
            for layer in layers:
                layer.probing = False
        for i in range(len(layers)):
            step, _, due = self.waiting[i]
            self.waiting[i] = (step, self._scores(step), due)

    # --- inside a layer -----------------------------------------------------------------------------------------------

    def _layer(self, module: nn.Module) -> KVLayer:
        return self.cache.layers[self.body.treated[self.number[module]]]

    def gather(self, module: nn.Module, view: AttentionView) -> AttentionView:
        cache = self._layer(module)
        if cache.probing:
            return view
        if view.position_ids is None:
            raise ValueError(f"{type(module).__name__} does not hand position_ids to its attention function")
        cache.note_positions(view.position_ids)
        self._count(cache, view)
        if view.k.shape[2] < cache.n:  # flat storage: `attend` reads it, the kernel gets nothing to do
            return view
        if cache.touched:
            view = replace(view, mask=self._mask(cache, view), causal=False)
            if self.evicts and self.method.re_position:
                view = self._re_position(module, cache, view)
        return view

    def _count(self, cache: KVLayer, view: AttentionView) -> None:
        """Find out which of the new tokens are real, how many there are now and where each sample begins."""
        m, first = view.q.shape[2], "lengths" not in self.common
        if first:
            self.real = None
            if view.mask is not None and m > 1:
                # the last row sees every token that is not padding
                seen = _visible(view.mask)[:, 0, -1, -m:].expand(len(view.q), m)
                self.real = None if bool(seen.all()) else seen
            new = torch.full((len(view.q),), m, device=view.q.device) if self.real is None else self.real.sum(1)
            self.common["lengths"] = new + cache.extra.get("lengths", 0)
        if self.real is not None:
            cache.mark_padding(self.real)
        if "start" not in cache.extra:
            begin = torch.zeros_like(self.common["lengths"])
            cache.extra["aligned"] = self.real is None
            cache.extra["start"] = begin if self.real is None else self.real.to(torch.uint8).argmax(1)
        cache.extra["lengths"] = self.common["lengths"]

    def _mask(self, cache: KVLayer, view: AttentionView) -> torch.Tensor | None:
        """Which slots every query may see: [b, 1|h, m, n] boolean or additive, None = all."""
        m, valid, index = view.q.shape[2], cache.valid, cache.index
        groups = index.shape[1]
        if view.mask is None:
            if m == 1:
                return None if valid is None else valid[:, :, None].repeat_interleave(view.q.shape[1] // groups, 1)
            arrival = torch.arange(cache.seen - m, cache.seen, device=index.device)[:, None]
            mask = index[:, :, None] <= arrival  # b g m n
        else:
            mask = view.mask.expand(len(index), groups, m, -1).gather(3, index[:, :, None].expand(-1, -1, m, -1))
        if valid is not None:
            hidden = ~valid[:, :, None]
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))
        return mask.repeat_interleave(view.q.shape[1] // groups, 1)

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
            self.inputs["input_ids"],
            self.common,
            self.generator,
        )

    def attend(self, module: nn.Module, view: AttentionView) -> torch.Tensor | None:
        cache = self._layer(module)
        if cache.probing:
            return None
        if view.k.shape[2] < cache.n:
            return _attend_flat(cache.flat, cache, view)
        return self.method.attend(self._step(module, view)) if self.attends else None

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        cache = self._layer(module)
        if cache.probing:
            self.method.observe(self._step(module, view))
            return
        again = self.first or (self.turns == "each" and view.q.shape[2] > 1)
        if view.k.shape[2] < cache.n or (self.idle and not again):
            return
        step = self._step(module, view)
        self.method.fold(step)
        if not self.evicts or (self.steady and self._replace_one(step)):
            return
        due = self.method.due(step)
        if again and self.method.when == "prefill" and not self.first:
            due = torch.ones_like(due)
        if not bool(due.any()):
            return
        if self.method.across_layers or (self.first and self.method.replays):
            scores = torch.empty(0) if self.method.replays and self.first else self._scores(step)
            self.waiting.append((step, scores, due))
        else:
            scores = self._scores(step)
            self._compress(step, scores, self.method.counts(step, scores), due)

    def _replace_one(self, step: Step) -> bool:
        """The common decode step, in as few operations as it takes: every head is one token over its budget, or none.

        Returns:
            Whether that was all there is to do.
        """
        cache = step.cache
        if step.m > 1 or cache.valid is not None or cache.cold:
            return False
        over = step.n - self.method.budget.of_length(cache.seen, step.layer + 1)
        if over != 1:
            return over <= 0
        worst = _worst(self._scores(step), cache.index, self.method.protect(step))
        if worst is None:
            return False
        cache.drop(worst)
        return True

    def _scores(self, step: Step) -> torch.Tensor:
        """The method's scores, checked."""
        scores, shape = self.method.score(step), (len(step.view.k), step.groups, step.n)
        if scores.shape != shape or scores.dtype != torch.float32:
            raise ValueError(
                f"{self.method.name} must give scores {shape} in float32, for ties decide otherwise; got "
                f"{tuple(scores.shape)} in {scores.dtype}"
            )
        return scores

    def _compress(self, step: Step, scores: torch.Tensor, counts: torch.Tensor, due: torch.Tensor) -> None:
        cache, method = step.cache, self.method
        held = cache.hot_counts
        counts = torch.where(due[:, None], torch.minimum(counts, held), held)
        if bool((counts == held).all()):
            return
        if step.m > 1:  # a decode step's would cost as much as the step
            self.trace.note_scores(step, scores)
        # what is packed already stays and takes no part
        cold = cache.n_cold
        index, valid, protect = cache.index[..., cold:], cache.valid, method.protect(step)
        scores = scores[..., cold:]
        valid = None if valid is None else valid[..., cold:]
        protect = None if protect is None else protect.expand(-1, -1, step.n)[..., cold:]
        if method.rest == "drop" and not self.masked and bool((held - counts == 1).all()):
            worst = _worst(scores, index, protect, valid)
            if worst is not None:
                cache.drop(worst + cold)
                return
        if cache.touched:  # slots are in no order, and of two equal scores the earlier token stays
            order = index.argsort(-1)
            scores, protect, valid = (x if x is None else x.gather(2, order) for x in (scores, protect, valid))
            kept = select.keep_top(scores, counts, protect, valid)
            kept = select.Kept(order.gather(2, kept.index), kept.valid)
        else:
            kept = select.keep_top(scores, counts, protect, valid)
        kept = select.Kept(kept.index + cold, kept.valid)
        cache.keep(kept.index, kept.valid, () if method.rest == "drop" else (others(kept, cache, int(method.rest)),))


def _worst(
    scores: torch.Tensor, index: torch.Tensor, protect: torch.Tensor | None, valid: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Slot [b, g] of the least score, of equal ones the latest token's; None if a head has none or holds NaN."""
    free = scores if protect is None else scores.masked_fill(protect, float("inf"))
    free = free if valid is None else free.masked_fill(~valid, float("inf"))
    low = free.amin(-1, keepdim=True)
    if not bool(low.isfinite().all()):
        return None
    return torch.where(free == low, index, -1).argmax(-1)


def others(kept: select.Kept, cache: KVLayer, bits: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The slots that are neither kept nor packed already, as `KVLayer.keep` takes them."""
    free = ~kept.mask(cache.n)
    free = free if cache.valid is None else free & cache.valid
    free[:, :, : cache.n_cold] = False
    left = select.ragged_heads(free)
    return left.index, left.valid, bits


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """An additive or boolean mask as a boolean one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _attend_flat(flat: Flat, cache: KVLayer, view: AttentionView) -> torch.Tensor:
    """One decode step over per-head storage and the dense tokens behind it, merged by their log-sum-exp."""
    parts = [ragged_attention(view.q, flat.keys, flat.values, flat.offsets, scaling=view.scaling, return_lse=True)]
    first = 0
    for part in cache.cold:
        keys, values = part.read(cache.dtype)
        valid = None if cache.valid is None else cache.valid[:, :, first : first + part.n]
        parts.append(_attend_dense(view, keys, values, valid))
        first += part.n
    parts.append(_attend_dense(view, *(x.view for x in cache.dense)))
    outputs, norms = zip(*parts, strict=True)
    return merge_attention(outputs, norms)


def _attend_dense(
    view: AttentionView, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return selected_attention(view.q, keys, values, None, scaling=view.scaling, valid=valid, return_lse=True)
