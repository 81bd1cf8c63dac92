"""What a method costs: time of prefill and generation, memory of the compression."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from keeprate.anatomy import decoder
from keeprate.attention import AttentionView
from keeprate.check import whole
from keeprate.kv.base import KVMethod
from keeprate.measure.cost import peak_memory, race
from keeprate.measure.kv.experiments import Methods, check_methods, needs_future
from keeprate.measure.kv.reading import Prefill
from keeprate.measure.table import ratios


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
    check_methods(methods)
    ids = ids.to(next(model.parameters()).device)

    def call(method: KVMethod | None) -> Callable[[], Any]:
        def run() -> None:
            with ExitStack() as block:
                if method is not None:
                    block.enter_context(method(model))
                model(ids, use_cache=True, logits_to_keep=1)

        return run

    taken = race([call(None), *map(call, methods.values())], ids.device, repeats, seconds_budget)
    return ratios(list(methods), taken[:, 0], taken[:, 1:], "share", lambda full, own: own / full - 1)


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
    check_methods(methods)
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
    table = ratios(list(methods), taken[:, 0], taken[:, 1:], "ratio", lambda full, own: full / own)
    table["total"] = np.median(total[:, :1] / total[:, 1:], 0)
    table["compression"] = np.median(filled[:, 1:] / filled[:, :1] - 1, 0)
    return table


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
    check_methods(methods)
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
            if method is None or needs_future(method) or getattr(method, "replays", False):
                raise ValueError(f"scoring of {name!r} ({method!r}) cannot be measured on a single random layer")

            def run(begin: Prefill = begin, method: KVMethod = method) -> None:
                with begin.resume(method, seed, copy=False):
                    pass

            gc.collect()  # what earlier runs left must not be freed while this one is watched
            peak, held = peak_memory(run, weight.device), 2 * k.numel() * k.element_size()
            table.append((name, length, peak, held, peak / held))
    return pd.DataFrame(table, columns=["method", "length", "bytes", "cache_bytes", "ratio"])
