"""Time and memory of calls: in turns, so that all of them see the same machine, and beyond what existed before."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def race(
    calls: Sequence[Callable[[], Any]],
    device: str | torch.device = "cpu",
    repeats: int = 10,
    seconds_budget: float = 10.0,
    warmup: int = 1,
    kernels: bool = False,
) -> np.ndarray:
    """Time several calls in turns, so that all of them see the same machine; compare them round by round.

    Args:
        calls: Functions without arguments.
        device: Where they work; a GPU is waited for.
        repeats: Rounds at most.
        seconds_budget: No new round is begun after this time; three are always measured (fewer if repeats is lower).
        warmup: Untimed rounds before.
        kernels: On a GPU, its own time between events instead of the wall clock: every call finds the cache cold and
            the GPU busy until it is queued, so that starting it costs nothing. Nothing changes on a CPU.

    Returns:
        [rounds, calls] milliseconds.

    Raises:
        ValueError: If repeats is below 1.

    Example:
        >>> race((lambda: x @ x, lambda: x + x))   # doctest: +SKIP
    """
    if repeats < 1:
        raise ValueError(f"repeats must be an integer of at least 1; got {repeats!r}")
    device = torch.device(device)
    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    # several times the largest cache of a GPU
    filler = torch.empty(2**28, dtype=torch.int16, device=device) if kernels and device.type == "cuda" else None

    def wall(call: Callable[[], Any]) -> Callable[[], float]:
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        took = (time.perf_counter() - start) * 1e3
        return lambda: took

    def events(call: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        filler.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    timed = wall if filler is None else events
    for _ in range(warmup):
        for call in calls:
            call()
    synchronise()
    rounds, begin = [], time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < 3 or time.perf_counter() - begin < seconds_budget):
        # the order turns in every round, so that drift of the clock rate favours none
        order = range(len(calls)) if len(rounds) % 2 == 0 else range(len(calls) - 1, -1, -1)
        taken = {i: timed(calls[i]) for i in order}
        synchronise()
        rounds.append([taken[i]() for i in range(len(calls))])
    return np.array(rounds)


def peak_memory(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Most bytes of tensors that a call held at once, beyond what existed before.

    Args:
        function: Called once, without arguments.
        device: Whose memory; on "cpu" torch's allocations are followed by its profiler.

    Returns:
        Bytes.

    Example:
        >>> peak_memory(lambda: torch.ones(1000) + 1)
        8000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profiled(profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(0, held.max(initial=0)))


@contextmanager
def profiled(profile_memory: bool) -> Iterator[profile]:
    """A CPU profile, without the lines that torch 2.13 prints at its start and stop."""
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=profile_memory)
    with _mute():
        record.start()
    try:
        yield record
    finally:
        with _mute():
            record.stop()


@contextmanager
def _mute() -> Iterator[None]:
    """Standard error of the whole process, C++ included, goes nowhere."""
    held, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(held, 2)
        os.close(held)
        os.close(nowhere)
