"""The device of a benchmark: its name, its versions, and the two rates nothing on it can pass."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from keeprate_kernels.bench.clock import race
from keeprate_kernels.runtime import HAS_TRITON, triton, use_triton


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured.

    Attributes:
        device: Its name, e.g. "NVIDIA H200".
        kind: "cpu" or "cuda".
        threads: Of torch on the CPU; 0 for a GPU.
        torch, triton: Versions; triton "none" where it is not installed.
        date: Of the run, UTC.
        backend: "triton" or "reference": what the public functions run here.
        copy_gbs: Measured copy bandwidth in 10^9 bytes/s, bytes read plus bytes written.
        matmul_gflops: Measured rate of a square matrix product in 10^9 FLOP/s, by dtype.
        load: Running and waiting processes (one-minute average) at the start, and the number of cores.
    """

    device: str
    kind: str
    threads: int
    torch: str
    triton: str
    date: str
    backend: str
    copy_gbs: float
    matmul_gflops: dict[str, float]
    load: str


def name_of(device: torch.device) -> str:
    """The device's name as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine() or "unknown CPU"


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; without a way to tell (not Linux), 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Least milliseconds of several calls: whatever else ran can only have slowed them."""
    return float(race([call], device, repeats=10, seconds_budget=3.0, kernels=True).min())


def _copy_gbs(size: int, device: torch.device) -> float:
    """Copy bandwidth in 10^9 bytes/s, bytes read plus bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device) / 1e6


def _matmul_gflops(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Rate of an n x n matrix product of random numbers in 10^9 FLOP/s."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / _fastest(lambda: a @ b, device) / 1e6


def measure(device: torch.device, quick: bool = False) -> Machine:
    """Name the device and measure its two ceilings.

    Args:
        device: CPU or GPU.
        quick: Small sizes, for a smoke run: the rates are then too low.

    Returns:
        The machine.
    """
    gpu = device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16) if gpu else (torch.float32,)
    n = 256 if quick else 8192 if gpu else 2048
    size = 2**22 if quick else 2**32 if gpu else 2**28  # bytes, beyond every cache
    return Machine(
        device=name_of(device),
        kind=device.type,
        threads=0 if gpu else torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton.__version__ if HAS_TRITON else "none",
        date=datetime.now(UTC).date().isoformat(),
        backend="triton" if use_triton(torch.empty(1, device=device)) else "reference",
        copy_gbs=_copy_gbs(size, device),
        matmul_gflops={str(dtype).removeprefix("torch."): _matmul_gflops(n, dtype, device) for dtype in dtypes},
        load=f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "unknown",
    )
