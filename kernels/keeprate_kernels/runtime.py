"""Shared by every kernel module: triton where there is one, the choice of backend, and compiling without a GPU.

On a GPU with triton an op runs its Triton kernel, everywhere else its plain-torch reference. triton's interpreter runs
kernels on a CPU, far too slowly for use: only a test that asks for it with `backend("triton")` gets it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references are all there is
    triton = tl = None

HAS_TRITON = triton is not None
# The variable is read when triton is imported: kernels defined from then on are interpreted, and cannot run on a GPU.
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
BACKENDS = ("triton", "reference", None)

_forced: ContextVar[str | None] = ContextVar("keeprate_kernels_backend", default=None)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op inside the block to its Triton kernel or to its reference.

    Args:
        name: "triton", "reference", or None for the usual choice by device.

    Raises:
        ValueError: If the name is another one, or "triton" where triton is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' was asked for, but triton is not installed; allowed here: 'reference', None")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on these tensors runs its Triton kernel: forced, or all of them are on a GPU that triton serves.

    Args:
        *tensors: The op's inputs; None entries (options left out) are skipped.

    Raises:
        ValueError: If "triton" is forced for CPU tensors while kernels are not interpreted.
    """
    given = [t for t in tensors if t is not None]
    on_gpu = bool(given) and all(t.is_cuda for t in given)
    forced = _forced.get()
    if forced == "triton" and not (on_gpu or INTERPRETED):
        devices = ", ".join(sorted({str(t.device) for t in given}))
        raise ValueError(
            f"backend 'triton' needs all tensors on one GPU, or TRITON_INTERPRET=1 set before triton is imported; "
            f"got tensors on {devices}"
        )
    if forced is not None:
        return forced == "triton"
    # bf16 dots need compute capability 8.0 (A100) or later
    return HAS_TRITON and not INTERPRETED and on_gpu and torch.cuda.get_device_capability(given[0].device) >= (8, 0)


@dataclass(frozen=True)
class CompileSpec:
    """One specialisation of a kernel, as the launcher would ask for it on a GPU.

    Attributes:
        kernel: The function under `@triton.jit`.
        signature: Type of every run-time argument, e.g. {"q_ptr": "*bf16", "n": "i32"}.
        constexprs: Value of every compile-time argument. A run-time stride that is always 1 belongs here too: a launch
            specialises it the same way, and only then are loads vectorised.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline; what shared memory grows with.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def compile(self, capability: int) -> Any:
        """Compile for a CUDA device of this compute capability (80: A100, 90: H100 and H200); no GPU is needed.

        Pointers and integers are taken as multiples of 16, as a launch on aligned tensors finds them: the case with the
        widest loads and the most shared memory.

        Returns:
            triton's compiled kernel; `.metadata.shared` is its shared memory in bytes.

        Raises:
            ValueError: If kernels are interpreted here, or an argument is missing or unknown.
        """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if INTERPRETED:
            raise ValueError("kernels are interpreted in this process; unset TRITON_INTERPRET and start anew")
        names = self.kernel.arg_names
        given = set(self.signature) | set(self.constexprs)
        if set(names) != given or set(self.signature) & set(self.constexprs):
            raise ValueError(
                f"{self.kernel.__name__} takes {', '.join(names)}, each once in signature or constexprs; "
                f"missing {sorted(set(names) - given)}, unknown {sorted(given - set(names))}, "
                f"twice {sorted(set(self.signature) & set(self.constexprs))}"
            )
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind[0] == "*" or kind[0] == "i"
        }
        source = ASTSource(self.kernel, signature, dict(self.constexprs), aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
