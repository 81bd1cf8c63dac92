"""Shared by the kernel tests: the device, and memory that is never zero by luck."""

from collections.abc import Iterator

import pytest
import torch

from .checks import DEVICE


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; on a CPU kernels are interpreted (tests/conftest.py sees to it)."""
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (the largest integer), so that whatever a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
