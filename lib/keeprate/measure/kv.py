"""Measure KV-cache methods: what they keep, what it costs the answer, what it costs in bytes and time.

Every method of a comparison reads the same prompts, so the model reads them once: `prefill` records what its attention
layers saw, and `Prefill.resume` lets a method compress that, through the very code that runs inside the model. `study`
and `perplexity` do this for recall and for text, with one row per method and sample; `summarise` turns rows into
numbers with intervals.

Question known: the prompt that is compressed ends with the question. Question unknown: the prompt is the context alone,
and the question comes after the compression.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from keeprate.anatomy import Decoder, decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.check import choice, whole
from keeprate.kv.base import EvictMethod, KVMethod, Modifier, ReadMethod
from keeprate.kv.baselines import OracleKV
from keeprate.kv.session import KVSession, KVTrace
from keeprate.measure.cost import peak_memory, race
from keeprate.measure.interval import bootstrap, wilson
from keeprate.score import by_kv_head, eviction_error
from keeprate.tasks.recall import Recall

QUESTIONS = ("known", "unknown")
ATTENTION_TRUTHS = ("oracle", "leave_one_out")
TRUTHS = (*ATTENTION_TRUTHS, "leave_one_out_loss", "grad_x_input")
Methods = Mapping[str, KVMethod | None]  # name in the tables -> method; None = the full cache
Scores = list[torch.Tensor]  # per treated layer [b, g, n], higher = matters more


# --- one reading of the prompt for all methods ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recorded(AttentionView):
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
        self.views[module] = _Recorded(**{f.name: getattr(view, f.name) for f in fields(AttentionView)})


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


def _continue(
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


# --- ground truth -----------------------------------------------------------------------------------------------------


class _Future(Listener):
    """What prompt tokens mean to the rows behind them: attention they receive, and the output's change without them."""

    def __init__(self, n: int, output: bool):
        self.n, self.output = n, output
        self.attention: dict[nn.Module, torch.Tensor] = {}
        self.change: dict[nn.Module, torch.Tensor] = {}

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        g, m = view.k.shape[1], view.q.shape[2]
        self.attention[module] = by_kv_head(view.received()[..., : self.n] / m, g)
        if self.output:
            error = eviction_error(view.probs().unflatten(1, (g, -1)), view.v)  # b g r m n
            self.change[module] = error.mean((2, 3))[..., : self.n]


@torch.no_grad()
def _future(begin: Prefill, future: torch.Tensor, output: bool) -> tuple[Scores, Scores]:
    watch = _Future(begin.ids.shape[1], output)
    modules = [begin.body.attention[i] for i in begin.body.treated]
    with listen(begin.model, watch, modules):
        begin.model(future, past_key_values=begin.full())
    return [watch.attention[m] for m in modules], [watch.change[m] for m in modules if output]


def oracle(begin: Prefill, future: torch.Tensor) -> Scores:
    """Attention that prompt tokens receive from the rows that follow: mean over rows and heads of a KV head.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.

    Returns:
        For every treated layer [b, g, n], as `kv.future_attention` gives it.
    """
    return _future(begin, future.to(begin.ids.device), False)[0]


def leave_one_out(begin: Prefill, future: torch.Tensor) -> Scores:
    """How far the attention output moves when one cached pair is masked: a / (1 - a) * ||o - v||, exactly.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.

    Returns:
        For every treated layer [b, g, n]: mean over the m rows and the query heads of each KV head; the output is
        that of a head, before the output projection.

    Source: closed form of the eviction error, CAOTE (2504.14051).
    """
    return _future(begin, future.to(begin.ids.device), True)[1]


@torch.no_grad()
def leave_one_out_loss(
    begin: Prefill, future: torch.Tensor, targets: int, positions: torch.Tensor | None = None, rows: int = 4096
) -> torch.Tensor:
    """How much the loss of what follows grows when one token is masked in all layers and heads.

    The replicas of the future that each miss one token stand side by side in one sequence and do not see each other,
    so that the prompt's cache is held once.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: The loss is the mean over so many last tokens of the future; at most m - 1.
        positions: Prompt tokens to mask; None = all.
        rows: Query rows of one call, all samples together: more are faster and need more memory.

    Returns:
        [b, positions]: nats a token, positive = the token matters.

    Raises:
        ValueError: If `targets` does not fit, or the model has layers with a sliding window.
    """
    b, n = begin.ids.shape
    m = future.shape[1]
    _check_targets(targets, m)
    if len(begin.body.treated) != len(begin.body.attention):
        raise ValueError("masking single tokens needs a model whose layers all cache the whole context")
    device, dtype = begin.ids.device, begin.views[0].q.dtype
    future = future.to(device)
    positions = torch.arange(n, device=device) if positions is None else positions.to(device)
    within = torch.ones(m, m, dtype=torch.bool, device=device).tril()

    def losses(without: torch.Tensor) -> torch.Tensor:
        """[b, r] loss of each replica; `without` [r] holds the token it misses, n = none."""
        r = len(without)
        others = torch.arange(n, device=device) != without.repeat_interleave(m)[:, None]  # rm n
        own = torch.block_diag(*[within] * r).bool()  # rm rm
        seen = torch.cat([others, own], 1)[None, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        logits = begin.model(
            future.repeat(1, r),
            past_key_values=begin.full(),
            position_ids=(n + torch.arange(m, device=device)).repeat(r)[None],
            attention_mask=mask.expand(b, -1, -1, -1),
        ).logits.unflatten(1, (r, m))
        return _nll(logits[:, :, :-1], future[:, None, 1:].expand(-1, r, -1))[..., -targets:].mean(-1)

    each = max(1, rows // (m * b))
    whole_cache = losses(torch.tensor([n], device=device))
    return torch.cat([losses(part) for part in positions.split(each)], 1) - whole_cache


def grad_x_input(begin: Prefill, future: torch.Tensor, targets: int) -> Scores:
    """First-order change of the loss if a cached pair were zero: |sum_d k dL/dk + v dL/dv|.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: The loss is the mean over so many last tokens of the future; at most m - 1.

    Returns:
        For every treated layer [b, g, n].

    Raises:
        ValueError: If `targets` does not fit.
    """
    _check_targets(targets, future.shape[1])
    future = future.to(begin.ids.device)
    with torch.enable_grad():
        pairs = [tuple(x.detach().clone().requires_grad_() for x in (view.k, view.v)) for view in begin.views]
        cache = DynamicCache(config=begin.body.body.config)
        for i, (k, v) in enumerate(pairs):
            cache.update(k, v, i)
        logits = begin.model(future, past_key_values=cache).logits
        # summed over samples: each has only its own pairs to answer for
        loss = _nll(logits[:, :-1], future[:, 1:])[:, -targets:].mean(1).sum()
        leaves = [x for i in begin.body.treated for x in pairs[i]]
        gradients = torch.autograd.grad(loss, leaves)
    products = [(x.detach().float() * g.float()).sum(-1) for x, g in zip(leaves, gradients, strict=True)]
    return [(k + v).abs() for k, v in zip(products[::2], products[1::2], strict=True)]


def truths(
    begin: Prefill, future: torch.Tensor, targets: int, which: Sequence[str] = TRUTHS, rows: int = 4096
) -> dict[str, Scores]:
    """Several ground truths by name, each a list over the treated layers of [b, g, n].

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: See `leave_one_out_loss`.
        which: Some of `TRUTHS`. "leave_one_out_loss" knows tokens, not layers and heads: it is the same in all.
        rows: See `leave_one_out_loss`.

    Raises:
        ValueError: On an unknown name, or as the single ones do.
    """
    for name in which:
        choice("truth", name, TRUTHS)
    found: dict[str, Scores] = {}
    if {"oracle", "leave_one_out"} & set(which):
        received, change = _future(begin, future.to(begin.ids.device), "leave_one_out" in which)
        found |= {"oracle": received, "leave_one_out": change}
    if "leave_one_out_loss" in which:
        loss = leave_one_out_loss(begin, future, targets, rows=rows)[:, None]
        found["leave_one_out_loss"] = [loss.expand(-1, begin.body.kv_heads, -1)] * len(begin.body.treated)
    if "grad_x_input" in which:
        found["grad_x_input"] = grad_x_input(begin, future, targets)
    return {name: found[name] for name in which}


def _check_targets(targets: int, m: int) -> None:
    if whole("targets", targets) >= m:
        raise ValueError(f"targets must lie in 1..{m - 1}, fewer than the {m} tokens that follow; got {targets}")


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token [...] under logits [..., v], in nats."""
    return -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


# --- a method against the truth ---------------------------------------------------------------------------------------


def _mask(kept: torch.Tensor, n: int) -> torch.Tensor:
    """Arrival numbers [b, g, k], -1 = none, as a mask over the first n tokens [b, g, n]."""
    blank = torch.zeros(*kept.shape[:2], n + 1, dtype=torch.bool, device=kept.device)
    return blank.scatter(2, torch.where((kept >= 0) & (kept < n), kept, n), True)[..., :n]


@dataclass(frozen=True)
class Judge:
    """A truth with its orders, which many methods are compared with.

    Attributes:
        worth: For every layer [b, g, n] how much each token matters.
        place: Its place when the most important come first, 0 = the most important; ties go to the earlier token.
        rank: Its rank from below, ties share their mean.
    """

    worth: Scores
    place: Scores
    rank: Scores

    @classmethod
    def of(cls, truth: Sequence[torch.Tensor]) -> "Judge":
        """Order a truth: for every layer [b, g, n], higher = matters more."""
        worth = [x.float().contiguous() for x in truth]
        place = [x.argsort(dim=-1, descending=True, stable=True).argsort(-1) for x in worth]
        return cls(worth, place, [_rank(x) for x in worth])

    def layers(self, which: Sequence[int]) -> "Judge":
        """Some of the layers."""
        return Judge(*([parts[i] for i in which] for parts in (self.worth, self.place, self.rank)))


def recall_at_budget(
    kept: Sequence[torch.Tensor], truth: Sequence[torch.Tensor] | Judge
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of what matters was kept, against the best choice of as many tokens per head.

    Args:
        kept: For every layer the arrival numbers [b, g, k] of the kept tokens, -1 = none: `KVTrace.kept`.
        truth: For every layer [b, g, n] how much each token matters.

    Returns:
        Recall [b], share of each head's B most important tokens that are among its B kept ones; and mass [b], what the
        kept ones sum to over what the best B sum to (negative importances count as none). Means over layers and heads.

    Raises:
        ValueError: If the layers do not pair up.
    """
    judge = truth if isinstance(truth, Judge) else Judge.of(truth)
    _check_layers(kept, judge.worth)
    shares, masses = [], []
    for held, worth, place in zip(kept, judge.worth, judge.place, strict=True):
        mask = _mask(held, worth.shape[-1])
        budget = mask.sum(-1, keepdim=True)
        best, worth = place < budget, worth.clamp_min(0.0)
        shares.append(((mask & best).sum(-1) / budget.squeeze(-1).clamp_min(1)).mean(1))
        masses.append(((worth * mask).sum(-1) / (worth * best).sum(-1).clamp_min(1e-30)).mean(1))
    return torch.stack(shares).mean(0), torch.stack(masses).mean(0)


def found(kept: Sequence[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that hold the answer which are kept, mean over layers and heads.

    Args:
        kept: As in `recall_at_budget`.
        truth: [b, n] boolean, such as `Recall.truth`.

    Returns:
        [b].
    """
    masks = [_mask(held, truth.shape[1]) for held in kept]
    there = truth.to(masks[0].device)[:, None]
    return torch.stack([((mask & there).sum(-1) / there.sum(-1)).mean(1) for mask in masks]).mean(0)


def votes(kept: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """Share of the KV heads of all layers that keep each of the first n tokens: [b, n]."""
    return torch.stack([_mask(held, n).float().mean(1) for held in kept]).mean(0)


def rank_correlation(scores: Sequence[torch.Tensor], truth: Sequence[torch.Tensor] | Judge) -> torch.Tensor:
    """Spearman correlation of a method's scores with the truth, mean over layers and heads.

    Args:
        scores: For every layer [b, g, seen]; NaN = the token was not there. What exceeds the truth is left out.
        truth: For every layer [b, g, n].

    Returns:
        [b].

    Raises:
        ValueError: If the layers do not pair up.
    """
    judge = truth if isinstance(truth, Judge) else Judge.of(truth)
    _check_layers(scores, judge.worth)
    rhos = []
    for score, worth, rank in zip(scores, judge.worth, judge.rank, strict=True):
        score = score[..., : worth.shape[-1]].float()
        there = score.isfinite()
        if bool(there.all()):
            a, b = _rank(score), rank
        else:
            a, b = (_rank(x.masked_fill(~there, float("inf"))) * there for x in (score, worth))
        count = there.sum(-1, keepdim=True).clamp_min(1)
        a, b = ((x - x.sum(-1, keepdim=True) / count) * there for x in (a, b))
        scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        rhos.append(((a * b).sum(-1) / scale.clamp_min(1e-30)).mean(1))
    return torch.stack(rhos).mean(0).float()


def _rank(x: torch.Tensor) -> torch.Tensor:
    """Ranks along the last axis, ties share their mean: places of a sort, averaged over each run of equal values."""
    n = x.shape[-1]
    ordered, index = x.sort(-1)
    place = torch.arange(n, device=x.device).expand_as(x)
    new = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)  # where a run begins
    first = place.masked_fill(~new, 0).cummax(-1).values
    ends = F.pad(new[..., 1:], (0, 1), value=True)
    last = place.masked_fill(~ends, n).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(x, dtype=torch.double).scatter_(-1, index, (first + last).double() / 2)


def _check_layers(given: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    if not given or [x.shape[:2] for x in given] != [x.shape[:2] for x in truth]:
        raise ValueError(
            f"one tensor [b, g, ...] a layer in both; got {[tuple(x.shape) for x in given]} and "
            f"{[tuple(x.shape) for x in truth]}"
        )


def kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of next-token predictions from the full cache's: [b, m, v] twice -> [b], nats."""
    p, q = full.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean(1)


def output_error(full: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relative error of attention outputs ||o - o'|| / ||o||, mean over layers and rows: lists of [b, m, c] -> [b]."""
    errors = [(a.float() - b.float()).norm(dim=-1) / a.float().norm(dim=-1) for a, b in zip(full, other, strict=True)]
    return torch.stack(errors).mean((0, 2))


# --- the two experiments ----------------------------------------------------------------------------------------------


def given(method: KVMethod | None, future: Scores) -> KVMethod | None:
    """An `OracleKV` without a future, alone or inside a modifier, gets this one; other methods stay as they are.

    Args:
        method: Any method.
        future: What `oracle` gives.
    """
    if isinstance(method, OracleKV) and not method.future:
        return replace(method, future=tuple(future))
    if isinstance(method, Modifier) and isinstance(method.base, EvictMethod):
        return replace(method, base=given(method.base, future))
    return method


def _needs_future(method: KVMethod | None) -> bool:
    return isinstance(method, OracleKV) or (isinstance(method, Modifier) and _needs_future(method.base))


def _read(trace: KVTrace, samples: int) -> float:
    """Bytes that a read-time method read per decode step and sample, all layers together."""
    steps = pd.DataFrame(trace.read)
    return float(steps.groupby("step")["bytes"].sum().mean() / samples)


def _check_methods(methods: Methods) -> None:
    for name, method in methods.items():
        if method is not None and not isinstance(method, KVMethod):
            raise ValueError(f"method {name!r} must be a KV-cache method or None for the full cache; got {method!r}")
    if not methods:
        raise ValueError("no methods given; at least one is needed")


@torch.no_grad()
def study(
    model: nn.Module,
    drawn: Recall | Sequence[Recall],
    methods: Methods,
    question: str = "unknown",
    batch: int = 16,
    seed: int = 0,
    truth: Sequence[str] = ("oracle",),
    progress: bool = True,
) -> pd.DataFrame:
    """Recall under several methods, beside what they kept and what it did to the model's outputs.

    An answer is right when every token of it is the likeliest one behind those before it; greedy decoding then gives
    exactly this answer and no other, so one teacher-forced pass decides it. With a known question the first answer
    token comes from the prompt's own last row, which every method computes with the full cache.

    Args:
        model: A causal language model of transformers.
        drawn: Samples of `tasks.recall`, or what `tasks.questions` gives.
        methods: By the name they get in the table; None = the full cache. An `OracleKV` is given the future.
        question: "known" or "unknown" while the cache is compressed.
        batch: Samples a pass.
        seed: Of the methods.
        truth: Ground truths to compare with, some of `TRUTHS`.
        progress: Show a bar.

    Returns:
        One row per method and sample: method, sample, question, kind;
        correct: whether the whole answer is right; nll: of the answer's tokens, mean, nats;
        tokens: kept of the prompt, mean over layers and heads; bytes: allocated for keys and values after compression;
        read: bytes of keys and values read per decode step;
        found: share of the answer's tokens that is kept (for read-time methods: was read at the last step);
        error: of attention outputs and kl: of next-token predictions against the full cache, mean over what follows;
        recall_<truth>, mass_<truth>: see `recall_at_budget`; correlation_<truth>: of the method's scores, NaN where it
        gives none. Truths about the loss are NaN where a single token follows.

    Raises:
        ValueError: On an unknown setting or truth, no methods, or as a method does.

    Example:
        >>> study(llm.model, drawn, {"full": None, "SnapKV": kr.kv.SnapKV(keep=0.1)})   # doctest: +SKIP
    """
    choice("question", question, QUESTIONS)
    _check_methods(methods)
    asked = list(dict.fromkeys([*truth, *(["oracle"] if any(map(_needs_future, methods.values())) else [])]))
    bar, tables = {} if progress else {"disable": True}, []
    first = 0
    for part in tqdm(_batches(drawn, batch), desc=f"question {question}", leave=False, **bar):
        cached, future = split(part, question)
        begin = prefill(model, cached)
        future = future.to(begin.ids.device)
        m = future.shape[1]  # a single token is predicted by the prompt's own last row: no loss to explain
        here = [key for key in asked if m > 1 or key in ATTENTION_TRUTHS]
        goal = truths(begin, future, max(1, min(part.answer.shape[1], m - 1)), here)
        judges = {key: Judge.of(goal[key]) for key in truth if key in goal}
        whole_cache = _continue(begin, begin.full(), future, outputs=True)
        holds = F.pad(part.truth, (0, cached.shape[1] - part.truth.shape[1]))
        for name, method in methods.items():
            columns = _answered(begin, given(method, goal.get("oracle", [])), future, part, whole_cache, seed)
            kept, scores = columns.pop("kept"), columns.pop("scores")
            layers = sorted(kept)
            held = [kept[i] for i in layers]
            columns["found"] = found(held, holds)
            places = [begin.body.treated.index(i) for i in layers]
            scored = [(scores[i], place) for i, place in zip(layers, places, strict=True) if i in scores]
            for key in truth:
                recalls, rho = (float("nan"), float("nan")), float("nan")
                if key in judges:
                    recalls = recall_at_budget(held, judges[key].layers(places))
                if key in judges and scored:
                    ranked, which = zip(*scored, strict=True)
                    rho = rank_correlation(ranked, judges[key].layers(which))
                columns |= {f"recall_{key}": recalls[0], f"mass_{key}": recalls[1], f"correlation_{key}": rho}
            told = {"method": name, "sample": range(first, first + len(part)), "question": question, "kind": part.kind}
            numbers = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in columns.items()}
            tables.append(pd.DataFrame(told | numbers))
        first += len(part)
    return pd.concat(tables, ignore_index=True)


def _answered(
    begin: Prefill,
    method: KVMethod | None,
    future: torch.Tensor,
    part: Recall,
    whole_cache: tuple[torch.Tensor, list[torch.Tensor]],
    seed: int,
) -> dict[str, Any]:
    """The columns of `study` for one batch and method, with the kept tokens and scores by layer."""
    b, a = part.answer.shape
    with begin.resume(method, seed) as now:
        if method is None:
            every = torch.arange(begin.ids.shape[1], device=begin.ids.device)
            kept = dict.fromkeys(begin.body.treated, every.expand(b, begin.body.kv_heads, -1))
            scores = {}
        else:
            kept = dict(zip(now.trace.layers, now.trace.kept, strict=True))
            scores = dict(now.trace.scores)
        logits, outputs = _continue(begin, now.cache, future, 1 if one_by_one(method) else None, outputs=True)
        read = now.nbytes / b
        if isinstance(method, ReadMethod):
            read = _read(now.trace, b)
            kept = dict(now.trace.chosen) or kept
    behind = torch.cat([now.logits.float()[:, None], logits], 1)[:, -a - 1 : -1]  # rows that predict the answer
    answer = future[:, -a:]
    return {
        "correct": (behind.argmax(-1) == answer).all(1),
        "nll": _nll(behind, answer).mean(1),
        "tokens": now.tokens,
        "bytes": now.nbytes / b,
        "read": read,
        "error": output_error(whole_cache[1], outputs),
        "kl": kl(whole_cache[0], logits),
        "kept": kept,
        "scores": scores,
    }


def rows(drawn: Recall, which: slice | Sequence[int]) -> Recall:
    """Some samples of a batch."""
    names = ("context", "question", "answer", "truth", "distractors")
    return replace(drawn, **{name: getattr(drawn, name)[which] for name in names})


def _batches(drawn: Recall | Sequence[Recall], batch: int) -> list[Recall]:
    """Samples of equal length in batches."""
    whole("batch", batch)
    parts = [
        rows(one, slice(first, first + batch))
        for one in ([drawn] if isinstance(drawn, Recall) else drawn)
        for first in range(0, len(one), batch)
    ]
    if not parts:
        raise ValueError("no samples given; at least one is needed")
    return parts


@torch.no_grad()
def perplexity(
    model: nn.Module,
    text: torch.Tensor,
    methods: Methods,
    context: int,
    step: int | None = None,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Loss on text behind a compressed, or continuously evicted, context.

    Args:
        model: A causal language model of transformers.
        text: [n, length] ids, such as `tasks.docs.text`.
        methods: By the name they get in the table; None = the full cache. An `OracleKV` is given the future.
        context: Tokens read first and compressed; 1 leaves all of the text to the decode steps.
        step: Tokens fed at a time behind the context; None = one for methods that evict or read at every step, all at
            once for the others.
        batch: Sequences a pass.
        seed: Of the methods.
        progress: Show a bar.

    Returns:
        One row per method and sequence: method, sample; nll: mean over the tokens behind the context but the first,
        which the prompt itself predicts, in nats (`summarise` adds perplexity); tokens, bytes: after the compression;
        last_bytes: at the end; read: bytes read per decode step; kl: as in `study`.

    Raises:
        ValueError: On no methods, or a context that leaves fewer than two tokens.
    """
    _check_methods(methods)
    if text.dim() != 2 or not 1 <= whole("context", context) <= text.shape[1] - 2:
        raise ValueError(f"text [n, length] must reach two tokens beyond context={context}; got {tuple(text.shape)}")
    bar, tables = {} if progress else {"disable": True}, []
    for first in tqdm(range(0, len(text), whole("batch", batch)), desc="text", leave=False, **bar):
        ids = text[first : first + batch]
        begin, b = prefill(model, ids[:, :context]), len(ids)
        future = ids[:, context:].to(begin.ids.device)
        seen = oracle(begin, future) if any(map(_needs_future, methods.values())) else []
        plain, _ = _continue(begin, begin.full(), future[:, :-1])
        for name, method in methods.items():
            each = step or (1 if one_by_one(method) else None)
            with begin.resume(given(method, seen), seed) as now:
                logits, _ = _continue(begin, now.cache, future[:, :-1], each)
                last = now.nbytes if now.trace is None else now.trace.nbytes
                read = _read(now.trace, b) if now.trace is not None and now.trace.read else last / b
            columns = {"nll": _nll(logits, future[:, 1:]).mean(1), "kl": kl(plain, logits), "tokens": now.tokens}
            told = {"method": name, "sample": range(first, first + b), "bytes": now.nbytes / b, "last_bytes": last / b}
            numbers = {k: v.cpu().numpy() for k, v in columns.items()}
            tables.append(pd.DataFrame(told | {"read": read} | numbers))
    return pd.concat(tables, ignore_index=True)


def summarise(samples: pd.DataFrame, by: Sequence[str] = ("method",), confidence: float = 0.95) -> pd.DataFrame:
    """Means over samples with intervals: Wilson's for what is right or wrong, bootstrap for the rest.

    Args:
        samples: Of `study` or `perplexity`, or several of them one below the other.
        by: Columns whose combinations get a row each, in order of appearance.
        confidence: Coverage.

    Returns:
        One row per combination: n, and for every measured column its mean, <column>_low and <column>_high; `correct`
        is called accuracy. Text gets perplexity = exp(nll), with its interval, too. NaN are left out of the means.

    Raises:
        ValueError: If a column is missing.
    """
    missing = [name for name in by if name not in samples]
    if missing or not len(samples):
        raise ValueError(f"no column {missing or 'has a row'}; the table has {', '.join(map(str, samples))}")
    told = {*by, "method", "sample", "question", "kind"}
    measured = [name for name in samples if name not in told and pd.api.types.is_numeric_dtype(samples[name])]
    found = []
    for key, part in samples.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, key, strict=True)) | {"n": len(part)}
        for name in measured:
            values = part[name].dropna().to_numpy()
            if values.dtype == bool:
                number, label = wilson(values, confidence), "accuracy" if name == "correct" else name
            elif len(values):
                number, label = bootstrap(values, confidence=confidence), name
            else:
                continue
            row |= {label: number.value, f"{label}_low": number.low, f"{label}_high": number.high}
        found.append(row)
    table = pd.DataFrame(found)
    if "nll" in table and "last_bytes" in table:
        for end in ("", "_low", "_high"):
            table[f"perplexity{end}"] = np.exp(table[f"nll{end}"])
    return table


# --- cost -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill_cost(
    model: nn.Module, ids: torch.Tensor, methods: Methods, repeats: int = 5, seconds_budget: float = 30.0
) -> pd.DataFrame:
    """Time of the compression as a share of the prefill, everybody in turns on the same machine.

    Args:
        model: A causal language model of transformers.
        ids: [b, n] prompts.
        methods: By name; None = the full cache once more, which shows the noise.
        repeats: Rounds at most.
        seconds_budget: No new round is begun after this time; three are always measured (fewer if repeats is lower).

    Returns:
        One row per method: method, full_ms, ms (medians), share = ms / full_ms - 1 (median of the rounds) with low and
        high (quartiles), rounds.
    """
    _check_methods(methods)
    ids = ids.to(next(model.parameters()).device)

    def call(method: KVMethod | None) -> Callable[[], Any]:
        def run() -> None:
            with ExitStack() as block:
                if method is not None:
                    block.enter_context(method(model))
                model(ids, use_cache=True, logits_to_keep=1)

        return run

    taken = race([call(None), *map(call, methods.values())], ids.device, repeats, seconds_budget)
    return _ratios(list(methods), taken[:, 0], taken[:, 1:], "share", lambda full, own: own / full - 1)


@torch.no_grad()
def generation_cost(
    model: nn.Module,
    ids: torch.Tensor,
    methods: Methods,
    new_tokens: int = 256,
    repeats: int = 3,
    seconds_budget: float = 60.0,
    warmup: int = 1,
) -> pd.DataFrame:
    """Time of generating under each method against the full cache, everybody in turns on the same machine.

    Args:
        model: A causal language model of transformers.
        ids: [b, n] prompts.
        methods: By name; None = the full cache once more, which shows the noise.
        new_tokens: Tokens to generate, by `model.generate`, greedily.
        repeats, seconds_budget: As in `prefill_cost`.
        warmup: Untimed rounds before.

    Returns:
        One row per method: method, full_ms, ms (medians, from the first new token to the last), ratio = full_ms / ms
        (median of the rounds; above 1 = faster than the full cache) with low and high (quartiles), rounds; total:
        the same ratio with prefill and compression counted; compression: time to the first new token over the full
        cache's, minus 1 (median of the rounds), which is what the compression adds to the prefill.
    """
    _check_methods(methods)
    whole("new_tokens", new_tokens, 2)
    ids = ids.to(next(model.parameters()).device)
    first: dict[int, list[float]] = {}
    decode: dict[int, list[float]] = {}

    class Watch(BaseStreamer):
        """Notes when each token comes; `generate` hands it over on the CPU, so a GPU has been waited for."""

        def __init__(self):
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def call(number: int, method: KVMethod | None) -> Callable[[], Any]:
        def run() -> None:
            watch = Watch()
            with ExitStack() as block:
                if method is not None:
                    block.enter_context(method(model))
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    streamer=watch,
                )
            # the first call hands over the prompt, the second the first new token
            first.setdefault(number, []).append(1e3 * (watch.times[1] - watch.times[0]))
            decode.setdefault(number, []).append(1e3 * (watch.times[-1] - watch.times[1]))

        return run

    calls = [call(i, method) for i, method in enumerate([None, *methods.values()])]
    total = race(calls, ids.device, repeats, seconds_budget, warmup)
    # the warm-up comes first
    taken, filled = (np.array([times[i][-len(total) :] for i in range(len(calls))]).T for times in (decode, first))
    table = _ratios(list(methods), taken[:, 0], taken[:, 1:], "ratio", lambda full, own: full / own)
    table["total"] = np.median(total[:, :1] / total[:, 1:], 0)
    table["compression"] = np.median(filled[:, 1:] / filled[:, :1] - 1, 0)
    return table


def _ratios(
    names: list[str],
    full: np.ndarray,
    own: np.ndarray,
    label: str,
    ratio: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> pd.DataFrame:
    low, middle, high = np.quantile(ratio(full[:, None], own), [0.25, 0.5, 0.75], axis=0)
    table = {"method": names, "full_ms": np.median(full), "ms": np.median(own, 0)}
    return pd.DataFrame(table | {label: middle, "low": low, "high": high, "rounds": len(full)})


@torch.no_grad()
def scoring_memory(
    model: nn.Module, methods: Methods, lengths: Sequence[int] = (1024, 4096, 16384), seed: int = 0
) -> pd.DataFrame:
    """Peak memory of compressing one layer's cache, by context length.

    The layer has the model's shapes and random queries, keys and values, so that lengths beyond the model's context
    can be measured without reading such a text.

    Args:
        model: A causal language model of transformers.
        methods: By name. Not `OracleKV`, which knows no future here, and not methods that read the prompt twice.
        lengths: Context lengths, in tokens.
        seed: Of the random tensors.

    Returns:
        One row per method and length: method, length, bytes (peak beyond what the prompt itself takes, what is kept
        included), cache_bytes (keys and values of the layer before), ratio = bytes / cache_bytes.

    Raises:
        ValueError: On a method that cannot be measured so.
    """
    _check_methods(methods)
    body, weight = decoder(model), next(model.parameters())
    one = replace(body, treated=body.treated[:1])
    table = []
    for length in lengths:
        generator = torch.Generator().manual_seed(seed)
        heads = (body.heads, body.kv_heads, body.kv_heads)
        q, k, v = (
            torch.randn(1, h, whole("length", length), body.head_dim, generator=generator).to(weight) for h in heads
        )
        place = torch.arange(length, device=weight.device)[None]
        view = AttentionView(q, k, v, None, body.head_dim**-0.5, True, place)
        views = tuple(view if i == one.treated[0] else None for i in range(len(body.attention)))
        begin = Prefill(model, one, torch.zeros_like(place), views, torch.empty(0))
        for name, method in methods.items():
            if method is None or _needs_future(method) or getattr(method, "replays", False):
                raise ValueError(f"scoring of {name!r} ({method!r}) cannot be measured on a single random layer")

            def run(begin: Prefill = begin, method: KVMethod = method) -> None:
                with begin.resume(method, seed, copy=False):
                    pass

            gc.collect()  # what earlier runs left must not be freed while this one is watched
            peak, held = peak_memory(run, weight.device), 2 * k.numel() * k.element_size()
            table.append((name, length, peak, held, peak / held))
    return pd.DataFrame(table, columns=["method", "length", "bytes", "cache_bytes", "ratio"])
