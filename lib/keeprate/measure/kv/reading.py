"""One reading of the prompt for all methods, and what follows it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from keeprate.anatomy import Decoder, decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.check import choice
from keeprate.kv.base import EvictMethod, KVMethod, ReadMethod
from keeprate.kv.session import KVSession, KVTrace
from keeprate.tasks.recall import Recall

QUESTIONS = ("known", "unknown")


@dataclass(frozen=True)
class Recorded(AttentionView):
    """A layer's view that computes column sums once for all methods that ask for the same ones.

    Attributes:
        memory: Sums by weights and reduction; "of" holds the queries and the mask they belong to.
    """

    memory: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def received(self, weight: torch.Tensor | None = None, reduce: str = "sum") -> torch.Tensor:
        of = self.memory.setdefault("of", (self.q, self.mask, self.k.shape))
        # a copy of this view may see other queries, or fewer keys
        if self.q is not of[0] or self.mask is not of[1] or self.k.shape != of[2]:
            return super().received(weight, reduce)
        key = reduce, None if weight is None else (weight.shape, weight.detach().cpu().numpy().tobytes())
        if key not in self.memory:
            self.memory[key] = super().received(weight, reduce)
        return self.memory[key].clone()  # methods write into what they carry


class _Record(Listener):
    """Keeps what every attention layer saw."""

    def __init__(self):
        self.views: dict[nn.Module, AttentionView] = {}

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        self.views[module] = Recorded(**{f.name: getattr(view, f.name) for f in fields(AttentionView)})


@dataclass
class Resumed:
    """A cache that a method has compressed, ready to be continued inside the `with` block that gave it.

    Attributes:
        cache: Give it to the model as `past_key_values`.
        trace: Of the method; None for the full cache.
        logits: [b, v] behind the prompt.
        nbytes: Bytes allocated for keys and values of the treated layers, right after the compression.
        tokens: [b] tokens kept, mean over layers and heads.
    """

    cache: DynamicCache
    trace: KVTrace | None
    logits: torch.Tensor = field(repr=False)
    nbytes: int
    tokens: torch.Tensor


@dataclass(frozen=True)
class Prefill:
    """A prompt that a model has read with the full cache; `prefill` makes it.

    Attributes:
        model: The causal language model.
        body: Its anatomy.
        ids: [b, n], without padding.
        views: What each attention layer saw; None = this layer holds no prompt.
        logits: [b, v] behind the prompt.
        again: What the layers saw when the prompt was read a second time behind itself; filled when a method asks.
    """

    model: nn.Module = field(repr=False)
    body: Decoder = field(repr=False)
    ids: torch.Tensor = field(repr=False)
    views: tuple[AttentionView | None, ...] = field(repr=False)
    logits: torch.Tensor = field(repr=False)
    again: dict[nn.Module, AttentionView] = field(default_factory=dict, repr=False, compare=False)

    def full(self) -> DynamicCache:
        """A cache of transformers' own with every key and value; it shares memory until it grows."""
        cache = DynamicCache(config=self.body.body.config)
        for i, view in enumerate(self.views):
            if view is not None:
                cache.update(view.k, view.v, i)
        return cache

    @contextmanager
    def resume(self, method: KVMethod | None = None, seed: int = 0, copy: bool = True) -> Iterator[Resumed]:
        """Let a method compress this prompt and stay active, as if the model had read the prompt inside its block.

        A method that changes attention while the prompt is read gets a real reading.

        Args:
            method: None = the full cache.
            seed: Of the method.
            copy: False hands over the recorded keys and values themselves: for one resumption only.

        Raises:
            ValueError: As the method itself does inside its block.
        """
        if method is None:
            cache = self.full()
            held = [cache.layers[i] for i in self.body.treated]
            nbytes = sum(x.numel() * x.element_size() for layer in held for x in (layer.keys, layer.values))
            yield Resumed(cache, None, self.logits, nbytes, torch.full((len(self.ids),), float(self.ids.shape[1])))
            return
        session = KVSession(method, self.body, seed, False, "first")
        with session.attach(self.model):
            cache, logits = DynamicCache(config=self.body.body.config), self.logits
            if not self._feed(session, cache, copy):
                cache = DynamicCache(config=self.body.body.config)
                logits = self.model(self.ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            held = [cache.layers[i] for i in self.body.treated]
            tokens = torch.stack([layer.counts.float().mean(1) for layer in held]).mean(0)
            yield Resumed(cache, session.trace, logits, session.trace.nbytes, tokens.cpu())

    def _feed(self, session: KVSession, cache: DynamicCache, copy: bool) -> bool:
        """Send the recorded layers through a session; False if the method would have attended in its own way."""
        given = {"input_ids": self.ids, "past_key_values": cache, "use_cache": True}
        session._before(self.body.body, (), given)
        for i, view in enumerate(self.views):
            if view is None:
                continue
            keys, values = (view.k.clone(), view.v.clone()) if copy else (view.k, view.v)
            keys, values = cache.layers[i].update(keys, values)
            module = self.body.attention[i]
            if module in session.number:
                seen = session.gather(module, replace(view, k=keys, v=values))
                if session.attend(module, seen) is not None:
                    return False
                session.fold(module, seen)

        def second_reading(**_: Any) -> None:
            """In place of the model, for methods that read the prompt twice."""
            if not self.again:
                watch = _Record()
                with listen(self.model, watch, list(session.number)):
                    self.model(self.ids, past_key_values=self.full(), logits_to_keep=1)
                self.again.update(watch.views)
            for module, view in self.again.items():
                session.fold(module, view)

        session._after(second_reading, (), given, None)
        return True


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> Prefill:
    """Read prompts once with the full cache.

    Args:
        model: A causal language model of transformers.
        ids: [b, n], without padding; moved to the model's device.

    Returns:
        What methods resume from; it holds queries, keys and values of every layer.

    Raises:
        ValueError: On an empty batch or an unsupported model.

    Example:
        >>> with prefill(llm.model, ids).resume(kr.kv.SnapKV(keep=0.1)) as now:   # doctest: +SKIP
        ...     llm.model(question, past_key_values=now.cache)
    """
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"prompts must be [b >= 1, n >= 1] token ids; got {tuple(ids.shape)}")
    body, watch = decoder(model), _Record()
    ids = ids.to(next(model.parameters()).device)
    with listen(model, watch, list(body.attention)):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return Prefill(model, body, ids, tuple(watch.views[module] for module in body.attention), logits)


# --- continuing -------------------------------------------------------------------------------------------------------


def one_by_one(method: KVMethod | None) -> bool:
    """Whether what follows must be fed token by token: the method reads, or evicts, at every decode step."""
    return isinstance(method, ReadMethod) or (isinstance(method, EvictMethod) and method.when == "decode")


@contextmanager
def _outputs(body: Decoder, into: list[list[torch.Tensor]]) -> Iterator[None]:
    """Collect what the attention modules of the treated layers give, [b, m, width] a call."""
    with ExitStack() as hooks:
        for place, i in enumerate(body.treated):

            def hook(module: nn.Module, args: Any, output: Any, place: int = place) -> None:
                into[place].append(output[0] if isinstance(output, tuple) else output)

            handle = body.attention[i].register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield


def continued(
    begin: Prefill, cache: DynamicCache, ids: torch.Tensor, step: int | None = None, outputs: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [b, m, v] in fp32 of teacher-forced tokens [b, m], fed `step` at a time, and the attention outputs."""
    heard: list[list[torch.Tensor]] = [[] for _ in begin.body.treated]
    with _outputs(begin.body, heard) if outputs else ExitStack():
        parts = [begin.model(part, past_key_values=cache).logits for part in ids.split(step or ids.shape[1], 1)]
    return torch.cat(parts, 1).float(), [torch.cat(calls, 1) for calls in heard if calls]


def split(drawn: Recall, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What is compressed and what follows.

    Args:
        drawn: Recall samples.
        question: "known": context and question are compressed, the answer follows. "unknown": the context is
            compressed, question and answer follow.

    Returns:
        ids [b, n] and [b, m]; the answer comes last.

    Raises:
        ValueError: On another setting.
    """
    if choice("question", question, QUESTIONS) == "known":
        return drawn.prompt, drawn.answer
    return drawn.context, torch.cat([drawn.question, drawn.answer], 1)
