"""Which backend runs: the reference on a CPU, whatever the environment says, unless a test forces the kernel."""

import os
import subprocess
import sys

import pytest
import torch

from keeprate_kernels import runtime
from keeprate_kernels.runtime import CompileSpec, backend, use_triton

from .checks import needs_triton, three_way

CPU = torch.zeros(1)


def test_a_cpu_tensor_runs_the_reference_even_when_kernels_are_interpreted():
    assert not use_triton(CPU, None)
    assert not use_triton()


@needs_triton
def test_a_forced_backend_ends_with_its_block_and_nests(device):
    x = CPU.to(device)
    usual = use_triton(x)
    with backend("triton"):
        assert use_triton(x)
        with backend("reference"):
            assert not use_triton(x)
            with backend(None):
                assert use_triton(x) == usual
        assert use_triton(x)
    with pytest.raises(KeyError), backend("triton"):
        raise KeyError
    assert use_triton(x) == usual


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'triton', 'reference', None; got 'cuda'"), backend("cuda"):
        pass


def test_without_triton_everything_imports_and_forcing_it_is_an_error():
    code = """
import sys
sys.modules["triton"] = None
import torch, keeprate_kernels
from keeprate_kernels.runtime import HAS_TRITON, backend
assert not HAS_TRITON
q = torch.ones(1, 1, 4, 2)
assert keeprate_kernels.attention_received(q, q, scaling=1.0).sum() == 4
try:
    backend("triton").__enter__()
except ValueError as error:
    assert "not installed" in str(error)
else:
    raise SystemExit("forcing triton passed")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_forcing_triton_on_a_cpu_without_the_interpreter_says_so(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with backend("triton"), pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*got tensors on cpu"):
        use_triton(CPU)


@needs_triton
def test_a_wrong_compile_spec_names_the_arguments(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(runtime, "INTERPRETED", False)
    kernel = SimpleNamespace(__name__="f_kernel", arg_names=["x_ptr", "n"])
    with pytest.raises(ValueError, match=r"missing \['n'\], unknown \['m'\]"):
        CompileSpec(kernel, {"x_ptr": "*bf16", "m": "i32"}).compile(80)


def test_three_way_rejects_what_is_wrong():
    exact = torch.tensor([1.0, float("-inf"), 100.0], dtype=torch.float64)
    low = exact.float() + torch.tensor([1e-3, 0, 0])
    three_way(low, low, exact)
    three_way(exact.float() + torch.tensor([0, 0, 1.9e-3]), low, exact)
    for wrong in ([1.0, float("-inf"), 100.01], [1.0, 0.0, 100.0], [float("nan"), float("-inf"), 100.0]):
        with pytest.raises(AssertionError):
            three_way(torch.tensor(wrong), low, exact)
    with pytest.raises(AssertionError):
        three_way(low[:2], low, exact)
