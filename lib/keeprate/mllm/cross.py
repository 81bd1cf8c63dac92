"""The session for models that read images through cross-attention: fewer features from the second such layer on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from keeprate import select
from keeprate.anatomy import Multimodal
from keeprate.attention import AttentionView, Listener, listen
from keeprate.kv.cache import take_over
from keeprate.mllm.session import MLLMTrace, Stopwatch, alone, no_checkpointing
from keeprate.mllm.trimmedllama import TrimmedLlama
from keeprate.reduce import gather_tokens
from keeprate.trace import Step


class CrossLayer(DynamicLayer):
    """Cached image features of one cross-attention layer, with the columns of the full mask that they belong to.

    Attributes:
        columns: [b, m] number of each feature among all image features; None = all are here.
        hidden: [b, n0] features that no row may see: dropped in a masked run. None = none.
        valid: [b, m] False = padding of a sample that kept fewer.
    """

    columns: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    owner: Any = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only some samples, or some of them several times."""
        super().batch_select_indices(indices)
        for name in ("columns", "hidden", "valid"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.index_select(0, indices.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample several times in a row."""
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Samples in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def cut(self) -> None:
        """Lose the features that are not in `columns`."""
        index = self.columns[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)


class CrossSession(Listener):
    """Lets the first cross-attention layer decide, and gives the later ones the features that stay."""

    def __init__(self, method: TrimmedLlama, parts: Multimodal, masked: bool):
        self.method, self.parts, self.masked = method, parts, masked
        self.cross = [i for i, layer in enumerate(parts.layers) if hasattr(layer, "cross_attn")]
        self.trace = MLLMTrace(repr(method), depth=len(self.cross))
        self.prompt, self.cache, self.running = False, None, False

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[MLLMTrace]:
        """Watch the cross-attention layers; undo it on leaving."""
        layers, body = [self.parts.layers[i] for i in self.cross], self.parts.body
        with ExitStack() as stack:
            stack.enter_context(alone(body))
            stack.callback(self._stop)
            self.running = True
            stack.enter_context(listen(model, self, [layers[0].cross_attn]))
            stack.callback(body.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(body.register_forward_hook(self._after).remove)
            for place, layer in enumerate(layers):
                stack.callback(layer.register_forward_pre_hook(self._hook(place), with_kwargs=True).remove)
            yield self.trace

    def _stop(self) -> None:
        self.running, self.prompt, self.cache = False, False, None
        self.columns = self.valid = self.hidden = self.rows = None

    def _before(self, body: nn.Module, args: tuple, kwargs: dict) -> None:
        no_checkpointing(self.parts.layers)
        states, cache = kwargs.get("cross_attention_states"), kwargs.get("past_key_values")
        given = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if given is None or given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError("the batch is empty; at least one prompt is needed")
        use_cache = kwargs.get("use_cache")
        if cache is None and (body.config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"] = cache = DynamicCache(config=body.config)
        self.cache = None if cache is None else take_over(cache, self.parts.depth, tuple(self.cross), CrossLayer)
        cached = bool(self.cache) and self.cache[0].get_seq_length() > 0
        self.prompt = states is not None
        if self.prompt and cached:
            raise ValueError(
                "TrimmedLlama takes the images of a conversation in its first prompt; more came in a later one"
            )
        if not self.prompt and not cached:
            raise ValueError("the prompt holds no image: visual-token methods need pixel_values")
        self.columns = self.valid = self.hidden = None
        if self.prompt:
            if not bool(states.isfinite().all()):
                raise ValueError("the image features hold NaN or infinity: so do pixel_values, or the model's weights")
            b = given.shape[0]
            states = states.view(b, -1, states.shape[-1])
            self.total = states.shape[1]
            seen = kwargs.get("full_text_row_masked_out_mask")
            real = kwargs.get("attention_mask")
            rows = torch.ones(b, given.shape[1], dtype=torch.bool, device=given.device)
            rows = rows if seen is None else seen[:, 0, :, 0].bool().expand_as(rows)
            self.rows = rows if real is None or real.dim() != 2 else rows & real[:, -rows.shape[1] :].bool()
            if not bool(self.rows.any(1).all()):
                blind = (~self.rows.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"samples {blind} of the batch hold no image")

    def _hook(self, place: int):
        def enter(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
            held = None if self.cache is None else self.cache[place]
            if self.prompt and place and held is not None:
                held.columns, held.valid, held.hidden = self.columns, self.valid, self.hidden
            source = self if self.prompt and place else held
            if source is None or (self.prompt and not place):
                return args, kwargs
            if self.prompt and source.columns is not None:
                states = gather_tokens(states.view(len(source.columns), -1, states.shape[-1]), source.columns)
            new = {"cross_attention_states": states, "cross_attention_mask": _cut(mask, source)}
            return args, kwargs | new

        return enter

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        """Decide, once the first cross-attention layer has attended to everything."""
        if not self.prompt:
            return
        valid = torch.ones(len(view.k), view.k.shape[2], dtype=torch.bool, device=view.k.device)
        if view.mask is not None:
            shown = view.mask[:, 0] > torch.finfo(view.mask.dtype).min / 2  # b n m
            valid = (shown & self.rows[:, :, None]).any(1)
        count, least = self.method.budget.tokens, int(valid.sum(1).min())
        if count is not None and count > least:
            raise ValueError(f"TrimmedLlama cannot keep {count} features a head: a sample has {least}")
        watch = Stopwatch()
        with watch.running(view.k.device):
            stays, scores = self.method.features(view, self.rows, valid)
        self.trace.seconds.append(watch.read())
        self._record(stays, valid, scores)
        if bool((stays == valid).all()):
            return
        if self.masked:
            self.hidden = ~stays
        else:
            kept = select.ragged(stays)
            self.columns, self.valid = kept.index, kept.valid
        if self.cache is not None:
            first = self.cache[0]
            first.columns, first.valid, first.hidden = self.columns, self.valid, self.hidden
            if not self.masked:
                first.cut()

    def _record(self, stays: torch.Tensor, valid: torch.Tensor, scores: torch.Tensor) -> None:
        kept = select.ragged(stays)
        index = kept.index if kept.valid is None else kept.index.masked_fill(~kept.valid, -1)
        slot = (stays.long().cumsum(1) - 1).masked_fill(~stays, -1)
        trace, total = self.trace, valid.sum(1)
        trace.runs.append([Step(1, index, (index >= 0).long(), slot, scores.masked_fill(~valid, float("nan")))])
        trace.batches.append(len(stays))
        trace.total = total if trace.total is None else torch.cat([trace.total, total])

    def _after(self, body: nn.Module, args: tuple, output: Any) -> None:
        self.prompt = False


def _cut(mask: torch.Tensor | None, source: Any) -> torch.Tensor | None:
    """The cross-attention mask [b, 1, n, m] for the features that are left."""
    if source.hidden is None and source.columns is None:
        return mask
    if mask is None:
        lost = source.hidden if source.columns is None else (None if source.valid is None else ~source.valid)
        return None if lost is None else ~lost[:, None, None]
    low, lost = torch.finfo(mask.dtype).min, source.hidden
    if source.columns is not None:
        index = source.columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask, lost = mask.gather(3, index), None if source.valid is None else ~source.valid
    # a row none of whose features is left sees all that are, as transformers has it for rows that see no image
    gone = torch.zeros((), dtype=torch.bool, device=mask.device) if lost is None else lost[:, None, None]
    blind = ((mask <= low / 2) | gone).all(-1, keepdim=True)
    return mask.masked_fill(blind, 0.0).masked_fill(gone, low)
