"""What it takes to accept a kernel."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from keeprate_kernels.runtime import HAS_TRITON, triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bf16 arithmetic is silently wrong in triton's interpreter, so it is tested on a GPU only
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
SIZES = (1, 31, 65, 257)
# a loop bound that is a tensor: triton 3.6's interpreter takes it for an array, which numpy 2.4 makes no integer of
UNFIT = (
    HAS_TRITON
    and DEVICE.type == "cpu"
    and triton.__version__.startswith("3.6.")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or UNFIT, reason="triton is not installed, or is 3.6, whose interpreter fails with numpy 2.4"
)


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers on the tested device, the same ones on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poison(*tensors: torch.Tensor) -> None:
    """Overwrite outputs handed to a kernel: NaN for numbers, the largest integer, True for booleans."""
    for t in tensors:
        t.fill_(float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


def three_way(
    kernel: torch.Tensor | Sequence[torch.Tensor],
    low: torch.Tensor | Sequence[torch.Tensor],
    truth: torch.Tensor | Sequence[torch.Tensor],
    tiny: float = 1e-6,
) -> None:
    """Assert |kernel - truth| <= 2 |low - truth| + tiny in the maximum norm, tensor by tensor.

    Args:
        kernel: What is tested.
        low: Plain torch in the same dtype as the kernel's inputs.
        truth: Plain torch in float64 on the same (rounded) inputs. Where it is infinite the kernel must be so too.
        tiny: Allowance for fp32 rounding, relative to the largest finite magnitude of `truth` (at least 1).
    """
    if isinstance(truth, torch.Tensor):
        kernel, low, truth = [kernel], [low], [truth]
    for found, rough, exact in zip(kernel, low, truth, strict=True):
        assert exact.dtype == torch.float64 and not exact.isnan().any(), "the truth is float64 and a number"
        assert found.shape == rough.shape == exact.shape, (found.shape, rough.shape, exact.shape)
        finite = exact.isfinite()
        assert torch.equal(found[~finite].double(), exact[~finite]), "infinite elsewhere than the truth"
        found, rough, exact = found[finite].double(), rough[finite].double(), exact[finite]
        if exact.numel() == 0:
            continue
        assert found.isfinite().all(), f"{(~found.isfinite()).sum()} of {found.numel()} elements are not finite"
        error, allowed = (found - exact).abs().max().item(), (rough - exact).abs().max().item()
        assert error <= 2 * allowed + tiny * max(1.0, exact.abs().max().item()), (error, allowed)
