"""The two experiments: recall and text under several methods."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from keeprate.check import choice, whole
from keeprate.kv.base import EvictMethod, KVMethod, Modifier, ReadMethod
from keeprate.kv.baselines import OracleKV
from keeprate.kv.session import KVTrace
from keeprate.measure.kv.judge import Judge, found, kl, output_error, rank_correlation, recall_at_budget
from keeprate.measure.kv.reading import QUESTIONS, Prefill, continued, one_by_one, prefill, split
from keeprate.measure.kv.truth import ATTENTION_TRUTHS, Scores, nll, oracle, truths
from keeprate.tasks.recall import Recall

Methods = Mapping[str, KVMethod | None]  # name in the tables -> method; None = the full cache


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


def needs_future(method: KVMethod | None) -> bool:
    return isinstance(method, OracleKV) or (isinstance(method, Modifier) and needs_future(method.base))


def _read(trace: KVTrace, samples: int) -> float:
    """Bytes that a read-time method read per decode step and sample, all layers together."""
    steps = pd.DataFrame(trace.read)
    return float(steps.groupby("step")["bytes"].sum().mean() / samples)


def check_methods(methods: Methods) -> None:
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
    check_methods(methods)
    asked = list(dict.fromkeys([*truth, *(["oracle"] if any(map(needs_future, methods.values())) else [])]))
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
        whole_cache = continued(begin, begin.full(), future, outputs=True)
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
        logits, outputs = continued(begin, now.cache, future, 1 if one_by_one(method) else None, outputs=True)
        read = now.nbytes / b
        if isinstance(method, ReadMethod):
            read = _read(now.trace, b)
            kept = dict(now.trace.chosen) or kept
    behind = torch.cat([now.logits.float()[:, None], logits], 1)[:, -a - 1 : -1]  # rows that predict the answer
    answer = future[:, -a:]
    return {
        "correct": (behind.argmax(-1) == answer).all(1),
        "nll": nll(behind, answer).mean(1),
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
    check_methods(methods)
    if text.dim() != 2 or not 1 <= whole("context", context) <= text.shape[1] - 2:
        raise ValueError(f"text [n, length] must reach two tokens beyond context={context}; got {tuple(text.shape)}")
    bar, tables = {} if progress else {"disable": True}, []
    for first in tqdm(range(0, len(text), whole("batch", batch)), desc="text", leave=False, **bar):
        ids = text[first : first + batch]
        begin, b = prefill(model, ids[:, :context]), len(ids)
        future = ids[:, context:].to(begin.ids.device)
        seen = oracle(begin, future) if any(map(needs_future, methods.values())) else []
        plain, _ = continued(begin, begin.full(), future[:, :-1])
        for name, method in methods.items():
            each = step or (1 if one_by_one(method) else None)
            with begin.resume(given(method, seen), seed) as now:
                logits, _ = continued(begin, now.cache, future[:, :-1], each)
                last = now.nbytes if now.trace is None else now.trace.nbytes
                read = _read(now.trace, b) if now.trace is not None and now.trace.read else last / b
            columns = {"nll": nll(logits, future[:, 1:]).mean(1), "kl": kl(plain, logits), "tokens": now.tokens}
            told = {"method": name, "sample": range(first, first + b), "bytes": now.nbytes / b, "last_bytes": last / b}
            numbers = {k: v.cpu().numpy() for k, v in columns.items()}
            tables.append(pd.DataFrame(told | {"read": read} | numbers))
    return pd.concat(tables, ignore_index=True)
