"""Cost: floating-point operations, wall clock against the dense model, peak memory."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from keeprate.anatomy import anatomy
from keeprate.check import whole
from keeprate.measure.interval import Interval
from keeprate.method import Method
from keeprate_kernels.bench.clock import peak_memory as peak_memory  # part of this module: what a benchmark needs too
from keeprate_kernels.bench.clock import profiled, race

Inputs = torch.Tensor | Mapping[str, torch.Tensor]
SELECT = "keeprate.select"  # label of the method's decisions in a profile


def _cdist_flop(a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """2 b n m d: distances are computed as a matrix product, which torch's counter does not know."""
    return 2 * int(np.prod(a[:-1])) * b[-2] * a[-1]


def _attention_flop(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Query-key and probability-value products of the CPU's fused kernel, which torch's counter leaves out."""
    return sdpa_flop_count(q, k, v)


# counted besides what torch's flop counter knows by itself
EXTRA = {
    torch.ops.aten._cdist_forward: _cdist_flop,
    torch.ops.aten._euclidean_dist: _cdist_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
}


def flops(model: nn.Module, inputs: Inputs, method: Method | None = None) -> int:
    """Floating-point operations of one forward pass, counted (1 multiply-add = 2 FLOP), selection included.

    Matrix products, convolutions, attention and pairwise distances count; sorting, norms and other elementwise work
    do not (they cost time, see `speed`).

    Args:
        model: The model.
        inputs: pixel_values [b, 3, h, w], or the model's keyword arguments.
        method: Applied meanwhile; None = the dense model.

    Returns:
        FLOPs of the whole batch.

    Example:
        >>> flops(vit.model, pixels) / flops(vit.model, pixels, kr.vit.ToMe(r=8))   # doctest: +SKIP
    """
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
        _forward(model, inputs, method)
    return counter.get_total_flops()


def flops_estimate(model: nn.Module, counts: torch.Tensor, where: str = "middle") -> int:
    """Floating-point operations from token counts alone: what a paper's formula gives, without selection work.

    A block costs 2 n W for each of its linear layers with W weights and 4 n^2 d for attention.

    Args:
        model: A supported vision model.
        counts: [b, depth] patch tokens that leave every block: `trace.counts()`.
        where: Where in the block tokens go: "before" it, in the "middle" (behind attention) or "after" it.

    Returns:
        FLOPs of the whole batch (1 multiply-add = 2 FLOP). In a ragged batch every sample counts for itself.

    Raises:
        ValueError: If `counts` does not have one column per block.

    Example:
        >>> flops_estimate(vit.model, trace.counts())   # doctest: +SKIP
    """
    body = anatomy(model)
    if counts.dim() != 2 or counts.shape[1] != body.depth:
        raise ValueError(f"counts must be [batch, {body.depth}], one column per block; got {tuple(counts.shape)}")
    patches = body.grid[0] * body.grid[1]
    after = counts.double().cpu() + body.prefix
    before = torch.cat([torch.full_like(after[:, :1], patches + body.prefix), after[:, :-1]], 1)
    attending, feeding = (after if where == "before" else before), (before if where == "after" else after)
    total, inside = 0.0, set()
    for i, layer in enumerate(body.layers):
        linear = [m for m in body.attention(layer).modules() if isinstance(m, nn.Linear)]
        own = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        n, weights = attending[:, i], sum(m.weight.numel() for m in linear)
        total += (2 * n * weights + 4 * n.square() * linear[0].out_features).sum()
        total += (2 * feeding[:, i] * (sum(m.weight.numel() for m in own) - weights)).sum()
        inside.update(own)
    for module in model.modules():  # the patch embedding runs once per patch, the head once per image
        if isinstance(module, nn.Conv2d):
            total += 2 * module.weight.numel() * patches * len(counts)
        elif isinstance(module, nn.Linear) and module not in inside:
            total += 2 * module.weight.numel() * len(counts)
    return int(total)


@dataclass(frozen=True)
class Speed:
    """Wall clock of a method against the dense model.

    Attributes:
        ratio: Dense time over method time: median of the pairs; low and high are their quartiles, n is their number.
        dense_ms, method_ms: Median milliseconds of a forward pass, the method's with selection.
        select_ms: Part of method_ms in which the method scores and decides; applying the decision is not in it.
        batch: Images in the pass.
        attention: Attention implementation of both.
    """

    ratio: Interval
    dense_ms: float
    method_ms: float
    select_ms: float
    batch: int
    attention: str

    @property
    def break_even_ms(self) -> float:
        """Selection time at which the method would be no faster than the dense model; negative if it never could."""
        return self.dense_ms - self.method_ms + self.select_ms

    def __repr__(self) -> str:
        r = self.ratio
        return (
            f"Speed({r.value:.2f}x [{r.low:.2f}, {r.high:.2f}] over {r.n} pairs at batch {self.batch}, "
            f"{self.attention}: {self.dense_ms:.1f} -> {self.method_ms:.1f} ms, {self.select_ms:.1f} of them selection)"
        )


def speed(
    model: nn.Module, inputs: Inputs, method: Method, repeats: int = 10, seconds_budget: float = 10.0, warmup: int = 1
) -> Speed:
    """Time a method against the dense model in alternation, so that both see the same machine.

    Args:
        model: A model that runs on SDPA.
        inputs: pixel_values [b, 3, h, w], or the model's keyword arguments.
        method: The method.
        repeats: Pairs of forward passes at most.
        seconds_budget: No new pair is begun after this time; three are always measured (fewer if repeats is lower).
        warmup: Untimed pairs before.

    Returns:
        Ratio and times.

    Raises:
        ValueError: If the model does not run on SDPA, or repeats is below 1.

    Example:
        >>> speed(vit.model, pixels, kr.vit.TopK(keep=0.5))   # doctest: +SKIP
    """
    whole("repeats", repeats)
    attention = model.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(
            f"speed is measured against SDPA; this model runs {attention!r}: set_attn_implementation('sdpa')"
        )
    device = next(model.parameters()).device
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    watch = [0.0]

    def timed(reduce: Callable, *args: Any) -> Any:
        synchronise()
        start = time.perf_counter()
        decision = reduce(*args)
        synchronise()
        watch[0] += time.perf_counter() - start
        return decision

    observed, selection = _observed(method, timed), []
    calls = (lambda: _forward(model, inputs, None), lambda: _forward(model, inputs, method))
    dense, reduced = race(calls, device, repeats, seconds_budget, warmup).T
    for _ in range(min(3, len(dense))):  # apart, since watching a GPU holds it up
        watch[0] = 0.0
        _forward(model, inputs, observed)
        selection.append(watch[0])
    low, middle, high = np.quantile(dense / reduced, [0.25, 0.5, 0.75])
    return Speed(
        Interval(float(middle), float(low), float(high), len(dense)),
        float(np.median(dense)),
        float(np.median(reduced)),
        float(np.median(selection)) * 1e3,
        len(next(iter(_keywords(inputs).values()))),
        attention,
    )


def operations(model: nn.Module, inputs: Inputs, method: Method, top: int = 5) -> pd.DataFrame:
    """The torch operations that a method's selection spends its time in.

    Args:
        model, inputs, method: As in `speed`.
        top: Number of rows.

    Returns:
        DataFrame with columns operation, ms (CPU, own time), share (of all selection time), calls; slowest first.

    Example:
        >>> operations(vit.model, pixels, kr.vit.ATC(keep=0.5))   # doctest: +SKIP
    """

    def marked(reduce: Callable, *args: Any) -> Any:
        with record_function(SELECT):
            return reduce(*args)

    _forward(model, inputs, method)
    with profiled(profile_memory=False) as record:
        _forward(model, inputs, _observed(method, marked))
    inside: dict[str, list[float]] = {}
    stack = [event for event in record.events() if event.name == SELECT]
    while stack:
        event = stack.pop()
        if event.name.startswith("aten::"):
            inside.setdefault(event.name.removeprefix("aten::"), []).append(event.self_cpu_time_total / 1e3)
        stack.extend(event.cpu_children)
    table = pd.DataFrame(
        [(name, sum(ms), len(ms)) for name, ms in inside.items()], columns=["operation", "ms", "calls"]
    )
    table.insert(2, "share", table["ms"] / table["ms"].sum())
    return table.sort_values("ms", ascending=False, ignore_index=True).head(top)


def _keywords(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def _forward(model: nn.Module, inputs: Inputs, method: Method | None) -> None:
    """One forward pass; entering and leaving the method is part of it."""
    with nullcontext() if method is None else method(model), torch.no_grad():
        model(**_keywords(inputs))


def _observed(method: Method, around: Callable) -> Method:
    """A copy of the method whose decisions go through `around(reduce, tokens)`."""
    clone = copy.copy(method)
    object.__setattr__(clone, "reduce", lambda *args: around(method.reduce, *args))  # the dataclass is frozen
    return clone
