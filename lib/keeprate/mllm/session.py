"""The session: one visual-token method at work inside a model, and the record of what it did.

The language model's own forward pass runs as it is. Hooks in front of its layers shorten the hidden states and hand
each layer rotary embeddings for the tokens that are left; in front of the attention function, the mask is cut to the
same tokens; the cache notes which of the arrived tokens a layer holds. On the way out everything goes back to its
place.
"""

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from keeprate import select
from keeprate.anatomy import DECODER_BLOCK, Multimodal
from keeprate.attention import AttentionView, Listener, listen
from keeprate.check import whole
from keeprate.kv.cache import take_over
from keeprate.kv.rope import turn
from keeprate.mllm.base import NO_QUESTION, Choice, Inside, MLLMMethod, Visual, dropped
from keeprate.mllm.encoder import around
from keeprate.reduce import Reduction, gather_tokens
from keeprate.trace import Step, Trace, join_steps


@dataclass
class MLLMTrace(Trace):
    """What a `with` block did to the visual tokens of its prompts. Layer 0 means "before the language model".

    A sample's visual tokens are numbered from 0 over all its images. `kept`, `sizes`, `assignments`, `scores`, `counts`
    and `mask` are those of `Trace`.

    Attributes:
        total: [b] visual tokens each sample came with.
        places: [b, n0, 4] image of the sample, view, row and column of each visual token, -1 = none (padding, a line
        end).
        seconds: Time spent in the method's decisions, and in what it looks at on the way, one number a forward pass.
    """

    total: torch.Tensor | None = None
    places: torch.Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """Layers at which some forward pass was shortened."""
        return sorted({step.layer for run in self.runs for step in run})

    @property
    def steps(self) -> list[Step]:
        """Steps of all forward passes joined along the batch; one that was left alone at a layer stays as it was."""
        runs, begin = [], 0
        for run, batch in zip(self.runs, self.batches, strict=True):
            here = {step.layer: step for step in run}
            states = [_untouched(self.total[begin : begin + batch])]
            for layer in self.layers:
                states.append(here.get(layer) or replace(states[-1], layer=layer, score=None))
            runs.append(states[1:])
            begin += batch
        return [join_steps(same) for same in zip(*runs, strict=True)]

    def counts(self) -> torch.Tensor:
        """[b, depth] visual tokens that every decoder layer processes.

        Raises:
            ValueError: If the model was not called inside the block.
        """
        if self.total is None:
            raise ValueError("no prompt has been read yet: call the model inside the `with` block")
        counts = self.total[:, None].repeat(1, self.depth)
        for step in self.steps:
            counts[:, step.layer :] = (step.size > 0).sum(1, keepdim=True)
        return counts.cpu()

    @property
    def mean_tokens(self) -> float:
        """Visual tokens a layer, mean over layers and samples: the budget that placements are compared at."""
        return self.counts().float().mean().item()


def _untouched(total: torch.Tensor) -> Step:
    """A step that leaves samples with `total` [b] visual tokens as they are."""
    number = torch.arange(int(total.max()), device=total.device).expand(len(total), -1)
    there = number < total[:, None]
    kept = number.masked_fill(~there, -1)
    return Step(0, kept, there.long(), kept)


class Stopwatch:
    """Adds up what blocks of work take; on a GPU the time between the two ends of each on its stream, without waiting.

    A clock on the CPU would charge a block that waits for a result with all the work queued before it.
    """

    def __init__(self):
        self.seconds = 0.0
        self.marks: list[list[torch.cuda.Event]] = []  # beginning and end of every block

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measure the work of the block on a device."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began
            return
        marks, stream = [torch.cuda.Event(enable_timing=True) for _ in range(2)], torch.cuda.current_stream(device)
        marks[0].record(stream)
        yield
        marks[1].record(stream)
        self.marks.append(marks)

    def read(self) -> float:
        """Seconds so far; waits until the GPU has done the last block."""
        if self.marks:
            self.marks[-1][1].synchronize()
        return self.seconds + sum(begin.elapsed_time(end) for begin, end in self.marks) / 1e3


_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@contextmanager
def alone(body: nn.Module) -> Iterator[None]:
    """Let one visual-token method at a time work on a language model, in front of an attention it knows.

    Raises:
        ValueError: If another one is active, or the model uses neither sdpa nor eager attention.
    """
    if body in _active:
        raise ValueError("a visual-token method is active on this model already; leave its with block first")
    inner = getattr(body.config, "_attn_implementation", "sdpa").removeprefix("keeprate_")
    if inner not in ("sdpa", "eager"):
        raise ValueError(f"visual-token methods work in front of sdpa or eager attention; this model uses {inner!r}")
    _active.add(body)
    try:
        yield
    finally:
        _active.discard(body)


def no_checkpointing(layers: Iterable[nn.Module]) -> None:
    """Raise a ValueError if the layers would run a second time in the backward pass, on a sequence that is gone."""
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(
            "visual-token methods do not work with gradient checkpointing, which runs layers again in the backward "
            "pass; call model.gradient_checkpointing_disable() first"
        )


class MLLMSession(Listener):
    """One method on one model: finds the visual tokens, shortens the sequence, keeps caches and positions in step."""

    reads_flat = False  # what the cache layer asks its owner

    def __init__(self, method: MLLMMethod, parts: Multimodal, seed: int, masked: bool, text: list[str] | None):
        if isinstance(text, str) or not isinstance(text, Sequence | None):
            raise ValueError(f"text must be a list with one question a sample; got {text!r}")
        self.method, self.parts, self.masked, self.words = method, parts, masked, text
        self.stages = {layer: i + 1 for i, layer in enumerate(method.layers_at(parts.depth))}
        self.watched = frozenset(method.watched(parts.depth))
        self.policy = method.policy_on(parts)
        self.encoder = method.encoder(parts)
        self.number = {layer.self_attn: i for i, layer in enumerate(parts.layers)}
        self.generator = torch.Generator().manual_seed(whole("seed", seed, 0))
        self.trace = MLLMTrace(repr(method), depth=parts.depth)
        self.running = False
        self.found: torch.Tensor | None = None
        self.prompt = False
        self.pixels: torch.Tensor | None = None  # [views, c, h, w] what the vision encoder saw last
        self.taps: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[MLLMTrace]:
        """Watch encoder, layers and attention; undo it on leaving."""
        parts, body = self.parts, self.parts.body
        with ExitStack() as stack:
            stack.enter_context(alone(body))
            stack.callback(self._stop)
            self.running = True
            stack.enter_context(self.encoder.attach(model))
            stack.enter_context(around(parts.inner, "get_placeholder_mask", self._find))
            stack.enter_context(listen(model, self, list(self.number)))
            stack.callback(parts.tower.register_forward_pre_hook(self._look, with_kwargs=True).remove)
            # first of all hooks: those that record hidden states shall see what a layer really gets
            stack.callback(body.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
            stack.callback(body.register_forward_hook(self._after, with_kwargs=True).remove)
            for i, layer in enumerate(parts.layers):
                hook = self._hook(i)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
                if self.method.middle and i in self.stages:
                    stack.enter_context(around(layer, "forward", self._halves(i, layer)))
            for i, name in self.method.taps(parts.depth):
                tap = parts.layers[i].get_submodule(name).register_forward_hook(self._tap(i, name), with_kwargs=True)
                stack.callback(tap.remove)
            yield self.trace

    def _stop(self) -> None:
        self.running, self.prompt, self.found, self.pixels = False, False, None, None
        self.taps = {}
        for name in ("view", "full", "cache"):
            self.__dict__.pop(name, None)
        self.encoder.clear()

    # --- around the language model ------------------------------------------------------------------------------------

    def _find(self, find: Any, *args: Any, **kwargs: Any) -> Any:
        """Learn from the model's own search where the visual tokens stand."""
        found = find(*args, **kwargs)
        mask = found[0] if isinstance(found, tuple) else found
        self.found = mask.any(-1) if mask.dim() == 3 else mask
        return found

    def _look(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.pixels = args[0] if args else kwargs.get("pixel_values")

    def _before(self, body: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = kwargs.get("inputs_embeds")
        if x is None:
            x = body.embed_tokens(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError("the batch is empty; at least one prompt is needed")
        no_checkpointing(self.parts.layers)
        cache = kwargs.get("past_key_values")
        visual, self.found = self.found, None
        use_cache = kwargs.get("use_cache")
        if cache is None and (body.config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"] = cache = DynamicCache(config=body.config)
        every = tuple(range(self.parts.depth))
        self.cache = None if cache is None else take_over(cache, self.parts.depth, every, owner=self)
        for layer in self.cache or ():
            layer.owner, layer.masked = self, self.masked
        seen = self.cache[0].seen if self.cache else 0
        self.prompt = visual is not None and bool(visual.any())
        if not self.prompt and seen == 0:
            raise ValueError(
                "the prompt holds no image: visual-token methods need pixel_values and the image tokens they stand for"
            )
        b, n = x.shape[:2]
        self.state: dict[str, torch.Tensor] = {}
        self.common: dict[str, Any] = {}
        self.view: AttentionView | None = None
        self.full: tuple[torch.Tensor, ...] | None = None
        self.ids = torch.arange(n, device=x.device).expand(b, n)
        self.valid: torch.Tensor | None = None
        self.version, self.shortened, self.made = 0, False, {}
        self.n, self.watch = n, Stopwatch()
        self.positions = _positions(kwargs.get("position_ids"), x, seen)
        if self.prompt:
            self._begin(x, visual, kwargs.get("attention_mask"))
        return args, kwargs

    def _begin(self, x: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Take stock of a prompt: its visual tokens, its words, its end."""
        if not bool(x.isfinite().all()):
            raise ValueError("the prompt's embeddings hold NaN or infinity: so do pixel_values, or the model's weights")
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError("visual-token methods need a 2-D attention_mask [b, n], or none")
        b, n = x.shape[:2]
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask[:, -n:].bool()
        self.real, self.is_visual = real, visual & real
        counts = self.is_visual.sum(1)
        if bool((counts == 0).any()):
            raise ValueError(f"samples {(counts == 0).nonzero().flatten().tolist()} of the batch hold no image")
        # number of each visual token in its sample; the question: words behind the first visual token, else all words
        self.rank = self.is_visual.long().cumsum(1) - 1
        words = real & ~visual
        behind = words & (self.rank >= 0)
        self.is_text = torch.where(behind.any(1, keepdim=True), behind, words & (words.long().cumsum(1) > 1))
        if self.method.text_guided and not bool(self.is_text.any(1).all()):
            raise ValueError(NO_QUESTION)
        self.last = n - 1 - real.flip(1).to(torch.uint8).argmax(1)  # b
        width = int(counts.max())
        number = torch.arange(width, device=x.device).expand(b, -1)
        there = number < counts[:, None]
        self.home = number.masked_fill(~there, -1)  # the visual token that stands for each one now, -1 = dropped
        for count in _wanted(self.method):
            if count > int(counts.min()):
                raise ValueError(
                    f"{self.method.name} cannot keep {count} tokens: a sample has {int(counts.min())} visual ones"
                )
        self.total, self.run = counts, []

    def _after(self, body: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.prompt:
            return output
        if self.method.output_aware and self.cache and self.shortened:
            self._trim()
        if self.parts.depth in self.watched:
            self._observe(self.parts.depth, output[0])
        self.prompt = False
        self._commit()
        x = output[0]
        if self.shortened:
            if self.valid is not None:
                x = x * self.valid[..., None].to(x.dtype)
            full = x.new_zeros(len(x), self.n, x.shape[-1])
            x = full.scatter(1, self.ids[..., None].expand_as(x), x)
            if isinstance(output, tuple):
                return (x, *output[1:])
            output.last_hidden_state = x
        return output

    def _commit(self) -> None:
        """Write a prompt that came through into the trace."""
        trace, table = self.trace, self.table
        trace.runs.append(self.run)
        trace.batches.append(len(table))
        trace.total = self.total if trace.total is None else torch.cat([trace.total, self.total])
        trace.seconds.append(self.watch.read())
        if table[..., 2:].numel():
            trace.grid = tuple((table[..., 2:].flatten(0, 1).amax(0) + 1).tolist())
        if trace.places is not None:
            width = max(trace.places.shape[1], table.shape[1])
            both = (trace.places, table)
            table = torch.cat([nn.functional.pad(t, (0, 0, 0, width - t.shape[1]), value=-1) for t in both])
        trace.places = table

    def _trim(self) -> None:
        """Cut the cache of every layer to the tokens that the last layer still had."""
        b = len(self.ids)
        alive = torch.zeros(b, self.n, dtype=torch.int8, device=self.ids.device)
        there = torch.ones_like(self.ids, dtype=torch.int8) if self.valid is None else self.valid.to(torch.int8)
        alive = alive.scatter_add(1, self.ids, there) > 0
        for layer in self.cache:
            earlier = layer.seen - self.n
            ever = nn.functional.pad(alive, (earlier, 0), value=True)
            held = ever[:, None].expand(-1, layer.index.shape[1], -1).gather(2, layer.index)
            held = held if layer.valid is None else held & layer.valid
            if not bool(held.all()):
                kept = select.ragged_heads(held)
                layer.keep(kept.index, kept.valid)

    # --- in front of a layer ------------------------------------------------------------------------------------------

    def _hook(self, number: int):
        def enter(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                self.full, self.text_positions = kwargs["position_embeddings"], kwargs.get("position_ids")
            if self.prompt and number in self.watched:
                self._observe(number, x)
            if self.prompt and number == 0:
                x = self._apply_before(x)
            if self.prompt and number in self.stages and not self.method.middle:
                x = self._apply_inside(number, x)
            args = (x, *args[1:]) if args else ()
            return args, kwargs | self._inputs(number) | ({} if args else {"hidden_states": x})

        return enter

    def _inputs(self, number: int) -> dict[str, Any]:
        """What a layer needs for the tokens that are left; notes them in its cache."""
        if self.cache and self.shortened:
            self.cache[number].announce(self.ids, self.valid, self.n)
        inputs: dict[str, Any] = {"position_embeddings": self._rotary(number)}
        if self.shortened and self.text_positions is not None:
            given = self.text_positions.expand(len(self.ids), -1)
            inputs["position_ids"] = given.gather(1, self.ids)
        return inputs

    def _halves(self, number: int, layer: nn.Module):
        """A layer in two halves, with the reduction between attention and MLP."""

        def forward(whole: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if not self.prompt:
                return whole(hidden_states, **kwargs)
            x = DECODER_BLOCK.attend(layer, hidden_states, **kwargs)
            return DECODER_BLOCK.feed(layer, self._apply_inside(number, x))

        return forward

    def _tap(self, number: int, name: str):
        def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if self.prompt:
                given = args[0] if args else kwargs["hidden_states"]
                self.taps[number, name] = given, output[0] if isinstance(output, tuple) else output

        return note

    def _rotary(self, number: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of a layer's tokens."""
        extra = self.cache[number].extra if self.cache else {}
        shift = extra.get("shift")
        compact = self.policy == "compact" and self.shortened
        if not self.shortened and shift is None:
            return self.full
        key = (self.version, extra.get("stage", 0))
        if key not in self.made:
            if self.policy == "keep":
                made = tuple(_gather(x, self.ids) for x in self.full), None
            else:
                position, moved = self._compact(shift) if compact else (self.positions - shift[:, None], shift)
                made = self.parts.body.rotary_emb(self.full[0], position), moved
            self.made[key] = made
        embeddings, moved = self.made[key]
        if compact and self.cache:
            extra["shift"], extra["stage"] = moved, self.version
        return embeddings

    def _compact(self, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions without gaps for the tokens that are left, and how far the last one moved."""
        whole = self.positions.expand(*self.positions.shape[:-2], len(self.ids), self.n)
        text = whole if whole.dim() == 2 else whole.amax(0)
        real = self.present()
        begin = text.gather(1, self.real.to(torch.uint8).argmax(1)[:, None])
        begin = begin if shift is None else begin - shift[:, None]
        new = begin + (real.long().cumsum(1) - 1).clamp_min(0)
        new = new if whole.dim() == 2 else new.expand(len(whole), -1, -1)
        moved = text.gather(1, self.last[:, None])[:, 0] - (begin[:, 0] + real.sum(1) - 1)
        # a sample that lost nothing keeps its ids, those of three axes too
        before = torch.zeros_like(moved) if shift is None else shift
        lossless = real.sum(1) == self.real.sum(1)
        old = whole.gather(-1, self.ids.expand(*whole.shape[:-1], -1)) - before[:, None]
        return torch.where(lossless[:, None], old, new), torch.where(lossless, before, moved)

    # --- reductions ---------------------------------------------------------------------------------------------------

    def _visual(self, x: torch.Tensor) -> tuple[Visual, torch.Tensor, torch.Tensor]:
        """The visual tokens image by image, with every image's sample and the sequence slots of its tokens."""
        device, totals = x.device, self.is_visual.sum(1)
        lengths = self.encoder.lengths
        if lengths is None:  # encoded outside the block: what a sample has counts as one image
            lengths = totals.tolist()
            ends = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
            places = torch.full((len(ends), 3), -1, device=device)
        else:
            ends, places = self.encoder.line_ends(), self.encoder.places()
        lengths = torch.tensor(lengths, device=device)
        copies = int(totals.sum()) // int(lengths.sum())  # beams read the same image
        # which sample does an image belong to, and where in it does it begin?
        sample = torch.searchsorted(totals[::copies].cumsum(0), lengths.cumsum(0) - lengths, right=True)
        begin = lengths.cumsum(0) - lengths  # among all tokens the encoder made
        offset = begin - (totals[::copies].cumsum(0) - totals[::copies])[sample]
        row = (sample[:, None] * copies + torch.arange(copies, device=device)).flatten()
        order = row.argsort(stable=True)
        image = torch.arange(len(lengths), device=device).repeat_interleave(copies)[order]
        row = row[order]
        # the patches of every image, line ends left out
        step = torch.arange(int(lengths.max()), device=device)
        inside = step < lengths[image][:, None]
        token = (begin[image][:, None] + step).clamp_max(len(ends) - 1)
        kept = select.ragged(inside & ~ends[token])
        token = token.gather(1, kept.index)
        spot = select.ragged(self.is_visual).index[row]  # slots of a sample's visual tokens
        slot = spot.gather(1, (offset[image][:, None] + kept.index).clamp_max(spot.shape[1] - 1))
        self._note_places(row, offset[image], kept, places[token])
        words = select.ragged(self.is_text) if bool(self.is_text.any(1).all()) else None
        text = x[:, :0] if words is None else gather_tokens(x, words.index)
        asked = self.words
        if asked is not None and len(asked) * copies != len(x):
            raise ValueError(f"text must hold one question a sample; got {len(asked)} for {len(x) // copies} samples")
        visual = Visual(
            gather_tokens(x[row], slot),
            kept.valid,
            places[token],
            text[row],
            None if words is None or words.valid is None else words.valid[row],
            None if asked is None else [asked[i] for i in (row // copies).tolist()],
            self.parts,
            self.encoder,
            token,
            self.generator,
        )
        return visual, row, slot

    def _note_places(self, row: torch.Tensor, offset: torch.Tensor, kept: select.Kept, place: torch.Tensor) -> None:
        number = torch.arange(len(row), device=row.device)
        image = number - torch.searchsorted(row.contiguous(), row)
        place = torch.cat([image[:, None, None].expand(*place.shape[:2], 1), place], 2)
        at = (offset[:, None] + kept.index).clamp_max(self.home.shape[1] - 1)
        table = torch.full((*self.home.shape, 4), -1, device=row.device)
        there = torch.ones_like(at, dtype=torch.bool) if kept.valid is None else kept.valid
        rows = row[:, None].expand_as(at)
        table[rows[there], at[there]] = place[there]
        self.table = table

    def _apply_before(self, x: torch.Tensor) -> torch.Tensor:
        visual, row, slot = self._visual(x)
        with self.watch.running(x.device):
            choice = self.method.before(visual)
            if isinstance(choice, torch.Tensor):
                choice = dropped(choice)
            if isinstance(choice, Reduction):
                choice = Choice(choice)
        if choice is None:
            return x
        reduction, values = choice.reduction, choice.x
        if values is None and reduction.slot is not None:
            values = reduction(visual.x)
        return self._apply(0, x, reduction, values, visual.valid, row, slot)

    def _step(self, number: int, x: torch.Tensor) -> Inside:
        """The running sequence as a method sees it."""
        present = self.is_visual.gather(1, self.ids)
        words = self.is_text.gather(1, self.ids)
        if self.valid is not None:
            present, words = present & self.valid, words & self.valid
        kept, text = select.ragged_heads(present), select.ragged_heads(words)
        self.sequence = x
        return Inside(
            x,
            kept.index,
            kept.valid,
            self.rank.gather(1, self.ids.gather(1, kept.index)),
            self.is_visual.sum(1),
            text.index,
            text.valid,
            ((self.ids == self.last[:, None]) & (True if self.valid is None else self.valid)).to(torch.uint8).argmax(1),
            self.view,
            number,
            self.stages.get(number, 0),
            self.parts,
            self.taps,
            self.common,
            self.generator,
            self,
        )

    def _observe(self, number: int, x: torch.Tensor) -> None:
        step = self._step(number, x)
        with self.watch.running(x.device):
            self.method.observe(step)

    def _apply_inside(self, number: int, x: torch.Tensor) -> torch.Tensor:
        step = self._step(number, x)
        if step.v == 0:
            return x
        with self.watch.running(x.device):
            choice = self.method.inside(step)
        if choice is None:
            return x
        if isinstance(choice, torch.Tensor):
            return self._leave(number, x, choice, step)
        values = choice(step.x) if choice.slot is not None else None
        row = torch.arange(len(x), device=x.device)
        return self._apply(number, x, choice, values, step.valid, row, step.slot)

    def _leave(self, number: int, x: torch.Tensor, keep: torch.Tensor, step: Inside) -> torch.Tensor:
        """Keep the visual tokens of a mask [b, v], of some samples perhaps none."""
        stays = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        there = torch.ones_like(keep) if step.valid is None else step.valid
        gone = there & ~keep
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(gone)
        stays[rows[gone], step.slot[gone]] = False
        self.home = self.home.masked_fill(~self._member(step.ids, there & keep), -1)
        return self._shorten(number, x, stays, None)

    def _member(self, ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """[b, n0] whether the token that stands for each visual token is one of `ids` [b, v] where `among`."""
        table = torch.zeros(self.home.shape, dtype=torch.int8, device=ids.device)
        table = table.scatter_add(1, ids.clamp_min(0), among.to(torch.int8)) > 0  # padding stands anywhere
        return table.gather(1, self.home.clamp_min(0)) & (self.home >= 0)

    def _apply(
        self,
        number: int,
        x: torch.Tensor,
        reduction: Reduction,
        values: torch.Tensor | None,
        valid: torch.Tensor | None,
        row: torch.Tensor,
        slot: torch.Tensor,
    ) -> torch.Tensor:
        """Carry out a reduction of the tokens at sequence slots `slot` [i, n] of the samples `row` [i]."""
        rep, there = reduction.rep, reduction.valid
        there = torch.ones_like(rep, dtype=torch.bool) if there is None else there
        present = torch.ones_like(slot, dtype=torch.bool) if valid is None else valid
        there = there & present.gather(1, rep)
        rows = row[:, None]
        target = slot.gather(1, rep)
        if values is not None:
            x = x.clone()
            x[rows.expand_as(target)[there], target[there]] = values[there].to(x.dtype)
        # who stands for whom, by number in the sample
        number_of = self.rank.gather(1, self.ids)[rows, slot]  # i n
        home = reduction.slots(slot.shape[1])
        new = torch.where(home >= 0, number_of.gather(1, rep).gather(1, home.clamp_min(0)), -1)
        table = torch.full((len(x), self.home.shape[1]), -1, device=x.device)
        table[rows.expand_as(slot)[present], number_of[present]] = new[present]
        # the sequence without what is represented elsewhere; the line ends of a sample that got shorter go too
        touched = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        touched[row[((new != number_of) & present).any(1)]] = True
        stays = ~self.is_visual.gather(1, self.ids) | ~touched[:, None]
        stays[rows.expand_as(target)[there], target[there]] = True
        whole = touched[:, None] & (self.home >= 0)
        self.home = torch.where(whole, table.gather(1, self.home.clamp_min(0)), self.home)
        scores = None
        if reduction.score is not None:
            scores = torch.full((len(x), self.home.shape[1]), float("nan"), device=x.device)
            scores[rows.expand_as(slot)[present], number_of[present]] = reduction.score.detach().float()[present]
        return self._shorten(number, x, stays, scores)

    def _shorten(self, number: int, x: torch.Tensor, stays: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        """Leave tokens [b, m] of the running sequence behind, or hide them in a masked run."""
        if self.valid is not None:
            stays = stays & self.valid
        if self.masked:
            self.valid = stays
        else:
            kept = select.ragged(stays)
            x, self.ids, self.valid = gather_tokens(x, kept.index), self.ids.gather(1, kept.index), kept.valid
            self.state = {name: gather_tokens(held, kept.index) for name, held in self.state.items()}
            if self.view is not None and self.view.q.shape[2] != x.shape[1]:
                self.view = None  # it spoke of another sequence
        self.shortened = True
        self.version += 1
        self._record(number, scores)
        return x

    def _record(self, number: int, scores: torch.Tensor | None) -> None:
        there = self.home >= 0
        size = torch.zeros_like(self.home).scatter_add(1, self.home.clamp_min(0), there.long())  # by number
        rep = size > 0
        order, real = select.positions(rep, 1)
        slot = (rep.long().cumsum(1) - 1).gather(1, self.home.clamp_min(0)).masked_fill(~there, -1)
        kept = order.masked_fill(~real, -1)
        self.run.append(Step(number, kept, size.gather(1, order) * real, slot, scores))

    # --- what methods ask for -----------------------------------------------------------------------------------------

    def carry(self, name: str) -> torch.Tensor:
        """See `Inside.carry`."""
        if name not in self.state:
            self.state[name] = torch.zeros(self.ids.shape, device=self.ids.device)
        return self.state[name]

    def present(self) -> torch.Tensor:
        """See `Inside.real`."""
        real = self.real.gather(1, self.ids)
        return real if self.valid is None else real & self.valid

    def places(self) -> torch.Tensor:
        """[b, n0, 4], see `MLLMTrace.places`."""
        return self.table

    def of_tokens(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the encoder says of visual tokens, all images behind each other, sample by sample.

        Args:
            tokens: [tokens, ...], one for every token the encoder made, line ends included.
            ids: [b, v] numbers of visual tokens in their sample; padding may be anything.

        Returns:
            [b, v, ...].
        """
        total = self.is_visual.sum(1)
        copies = int(total.sum()) // len(tokens)  # beams read the same image
        begin = total[::copies].cumsum(0) - total[::copies]
        return tokens[begin.repeat_interleave(copies)[:, None] + ids.clamp_min(0)]

    def ahead(self, number: int, rows: torch.Tensor) -> AttentionView:
        """See `Inside.ahead`."""
        layer, x = self.parts.layers[number], self.sequence
        attention, normed = layer.self_attn, getattr(layer, DECODER_BLOCK.norm1)(x)
        cos, sin = (e.expand(len(x), -1, -1) for e in self._rotary_now(number))

        def heads(y: torch.Tensor, name: str, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            y = getattr(attention, f"{name}_proj")(y).unflatten(-1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            y = (y if norm is None else norm(y)).transpose(1, 2)
            return turn(y, cos[:, None], sin[:, None])

        q = heads(gather_tokens(normed, rows), "q", gather_tokens(cos, rows), gather_tokens(sin, rows))
        k = heads(normed, "k", cos, sin)
        real = self.present()
        mask = (self.ids[:, None] <= self.ids.gather(1, rows)[:, :, None]) & real[:, None]  # b r m
        held = self.cache[number] if self.cache else None
        if held is not None and held.seen:
            k = torch.cat([held.read()[0], k], 2)
            earlier = torch.ones(len(x), held.n, dtype=torch.bool, device=x.device)
            earlier = earlier if held.valid is None else held.valid[:, 0]
            mask = torch.cat([earlier[:, None].expand(-1, rows.shape[1], -1), mask], 2)
        return AttentionView(q, k, k, mask[:, None], attention.scaling)

    def _rotary_now(self, number: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of the running sequence before this layer's reduction, without noting anything."""
        extra = self.cache[number].extra if self.cache else {}
        held = {name: extra.get(name) for name in ("shift", "stage")}
        made = self._rotary(number)
        for name, value in held.items():
            extra.pop(name, None) if value is None else extra.__setitem__(name, value)
        return made

    # --- in front of attention ----------------------------------------------------------------------------------------

    def gather(self, module: nn.Module, view: AttentionView) -> AttentionView:
        held = self.cache[self.number[module]] if self.cache else None
        if not self.shortened and (held is None or not held.touched):
            return view
        columns = self.ids if held is None else held.index[:, 0]  # b k: arrival number of every key
        there = self.valid if held is None else (None if held.valid is None else held.valid[:, 0])
        rows = view.q.shape[2]
        if view.mask is None:
            if there is None and (rows == 1 or rows == view.k.shape[2]):
                return view  # a prompt in order, or one row that sees all
            mask = there[:, None, None] if there is not None else None
            if rows > 1:
                arrived = self.ids + (0 if held is None else held.seen - self.n)
                seen = (columns[:, None] <= arrived[:, :, None])[:, None]
                mask = seen if mask is None else seen & mask
            return replace(view, mask=mask, causal=False)
        mask = view.mask.expand(len(columns), -1, -1, -1)
        if self.shortened and mask.shape[2] != 1:
            mask = mask.gather(2, self.ids[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        if there is not None:
            hidden = ~there[:, None, None]
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return replace(view, mask=mask, causal=False)

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        if self.prompt:
            self.view = view


def _wanted(method: MLLMMethod) -> list[int]:
    """Numbers of tokens that a method's budget asks for outright."""
    budget = method.budget
    entries = budget.schedule or (budget.tokens,)
    return [entry for entry in entries if isinstance(entry, int)]


def _gather(embeddings: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings [b|1, n, d] of some tokens [b, m]."""
    return gather_tokens(embeddings.expand(len(ids), -1, -1), ids)


def _positions(given: torch.Tensor | None, x: torch.Tensor, seen: int) -> torch.Tensor:
    """Position ids [b|1, n], or [3, b, n] with multimodal rotary embeddings, as the model understands them."""
    if given is None:
        return torch.arange(seen, seen + x.shape[1], device=x.device)[None]
    return given[1:] if given.dim() == 3 and len(given) == 4 else given  # a row of text positions may come first
