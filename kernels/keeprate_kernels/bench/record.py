"""From a race to rows: what is timed against what, and what came of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from keeprate_kernels.bench.clock import peak_memory
from keeprate_kernels.bench.clock import race as take_turns
from keeprate_kernels.bench.machine import Machine

OK = "ok"


@dataclass(frozen=True)
class Line:
    """One row to be: one call of a race against another.

    Attributes:
        case: What the op is asked for, e.g. "all rows, causal".
        call: Name of the op's call in the race.
        against: Name of the baseline's call.
        bytes: Least that must be moved: every input read once, every output written once.
        flops: Least arithmetic the result needs in matrix products, 2 for a multiply-add; 0 where there are none.
    """

    case: str
    call: str
    against: str
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Race:
    """Calls on the same inputs, timed in turns.

    Attributes:
        op: The public function under test.
        shape: Sizes, as text.
        n: The size that the op's cost is plotted against.
        dtype: Of the inputs.
        build: Makes inputs on a device and gives the calls by name; nothing is allocated before.
        lines: The rows to make of it.
        needs: Bytes that a call needs beyond the inputs, by name, for those that may not fit.
        wall: Time by the wall clock on a GPU too: for baselines whose cost is starting many small kernels.
    """

    op: str
    shape: str
    n: int
    dtype: torch.dtype
    build: Callable[[torch.device], Mapping[str, Callable[[], object]]]
    lines: tuple[Line, ...]
    needs: Mapping[str, int] = field(default_factory=dict)
    wall: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times in ms, memory in MiB beyond the inputs; empty where a number was not taken."""

    op: str
    case: str
    against: str
    ratio: float | None
    ratio_q1: float | None
    ratio_q3: float | None
    median_ms: float | None
    q1_ms: float | None
    q3_ms: float | None
    against_ms: float | None
    memory_mib: float | None
    against_memory_mib: float | None
    rounds: int | None
    shape: str
    n: int
    dtype: str
    bytes: int
    flops: int
    bandwidth_share: float | None
    matmul_share: float | None
    backend: str
    device: str
    kind: str
    threads: int
    torch: str
    triton: str
    date: str
    copy_gbs: float
    matmul_gflops: float | None
    load: str
    note: str
    status: str


NUMBERS = [f.name for f in fields(Row) if "None" in str(f.type)]


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:160]


def run(
    race: Race,
    machine: Machine,
    device: torch.device,
    free: int,
    seconds: float = 6.0,
    repeats: int = 15,
    note: str = "",
) -> Iterator[Row]:
    """Run one race.

    A call that does not fit into memory or that torch.compile cannot build gives rows that say so; any other failure
    gives rows whose status begins with "error".

    Args:
        race: What to time.
        machine: Where.
        device: The same as torch knows it.
        free: Bytes of memory that calls may take.
        seconds: No new round is begun after this time.
        repeats: Rounds at most.
        note: What else the machine was doing.

    Yields:
        One row for each of the race's lines.
    """
    failed: dict[str, str] = {}
    memory: dict[str, float] = {}
    calls: Mapping[str, Callable[[], object]] = {}
    try:
        calls = race.build(device)
    except Exception as error:
        failed = {name: f"error: {first_line(error)}" for line in race.lines for name in (line.call, line.against)}
    for name, call in calls.items():
        if race.needs.get(name, 0) > free:
            failed[name] = f"not run: needs {race.needs[name] / 2**30:.0f} GiB, {free / 2**30:.0f} may be taken"
            continue
        try:
            call()  # compiles, and shows what cannot run
            memory[name] = peak_memory(call, device) / 2**20
        except torch.OutOfMemoryError:
            failed[name] = "not run: out of memory"
        except Exception as error:
            compiled = name.startswith("compiled")
            failed[name] = f"{'not run: torch.compile failed' if compiled else 'error'}: {first_line(error)}"
    good = [name for name in calls if name not in failed]
    times: dict[str, np.ndarray] = {}
    if good:
        try:
            taken = take_turns([calls[name] for name in good], device, repeats, seconds, kernels=not race.wall)
            times = dict(zip(good, taken.T, strict=True))
        except Exception as error:
            failed |= dict.fromkeys(good, f"error: {first_line(error)}")
    for line in race.lines:
        yield _row(race, line, machine, times, memory, failed, note)


def _row(
    race: Race,
    line: Line,
    machine: Machine,
    times: Mapping[str, np.ndarray],
    memory: Mapping[str, float],
    failed: Mapping[str, str],
    note: str,
) -> Row:
    """The row of one line, with whatever of it was measured."""
    dtype = str(race.dtype).removeprefix("torch.")
    numbers: dict[str, float | int | None] = dict.fromkeys(NUMBERS)
    numbers["matmul_gflops"] = machine.matmul_gflops.get(dtype)
    status = failed.get(line.call) or failed.get(line.against) or OK
    mine, other = times.get(line.call), times.get(line.against)
    if mine is not None:
        q1, median, q3 = np.quantile(mine, [0.25, 0.5, 0.75])
        numbers |= {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "rounds": len(mine)}
        numbers["memory_mib"] = memory[line.call]
        numbers["bandwidth_share"] = line.bytes / (median * 1e6 * machine.copy_gbs)
        if numbers["matmul_gflops"]:
            numbers["matmul_share"] = line.flops / (median * 1e6 * numbers["matmul_gflops"])
    if other is not None:
        numbers |= {"against_ms": np.median(other), "against_memory_mib": memory[line.against]}
    if mine is not None and other is not None:
        q1, median, q3 = np.quantile(mine / other, [0.25, 0.5, 0.75])
        numbers |= {"ratio": median, "ratio_q1": q1, "ratio_q3": q3}
    rounded = {name: _short(value) for name, value in numbers.items()}
    return Row(
        op=race.op, case=line.case, against=line.against, shape=race.shape, n=race.n, dtype=dtype,
        bytes=line.bytes, flops=line.flops, backend=machine.backend, device=machine.device, kind=machine.kind,
        threads=machine.threads, torch=machine.torch, triton=machine.triton, date=machine.date,
        copy_gbs=_short(machine.copy_gbs), load=machine.load, note=note, status=status, **rounded,
    )  # fmt: skip


def _short(value: float | int | None) -> float | int | None:
    """Four significant digits: what a timing is good for."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
