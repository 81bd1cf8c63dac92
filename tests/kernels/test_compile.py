"""Every kernel builds in bf16 for A100 and H100, and its shared memory fits; no GPU is needed."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

import keeprate_kernels
from keeprate_kernels.runtime import HAS_TRITON, CompileSpec

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# Compute capability: shared memory one program may have, in bytes (CUDA C++ Programming Guide, table of technical
# specifications per compute capability).
LIMITS = {80: 163 * 1024, 90: 227 * 1024}
OPS = sorted(m.name for m in pkgutil.iter_modules(keeprate_kernels.__path__) if not (m.ispkg or m.name == "runtime"))
# Runs without TRITON_INTERPRET, which this process may have set for good.
SCRIPT = """
import importlib, json, sys
from triton import JITFunction
module = importlib.import_module("keeprate_kernels." + sys.argv[1])
specs = module.compile_specs()
kernels = {n for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
report = {"unlisted": sorted(kernels - {s.kernel.__name__ for s in specs}), "built": []}
for spec in specs:
    for capability in map(int, sys.argv[2:]):
        built = spec.compile(capability)
        report["built"].append([spec.kernel.__name__, capability, built.metadata.shared, len(built.asm["cubin"]),
                                any("bf16" in kind for kind in spec.signature.values())])
print(json.dumps(report))
"""


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_builds_for_a100_and_h100(op, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # a cache of its own: what is reported was built now
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-c", SCRIPT, op, *map(str, LIMITS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["unlisted"], f"kernels without a CompileSpec: {report['unlisted']}"
    assert any(bf16 for *_, bf16 in report["built"]), "no kernel was built in bf16"
    for kernel, capability, shared, size, _ in report["built"]:
        assert size > 0
        assert shared <= LIMITS[capability], f"{kernel} takes {shared} bytes of shared memory on sm_{capability}"


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_specs_name_every_argument(op):
    """Without building: each argument of a kernel is typed or given a value, once."""
    for spec in importlib.import_module(f"keeprate_kernels.{op}").compile_specs():
        assert isinstance(spec, CompileSpec)
        assert sorted([*spec.signature, *spec.constexprs]) == sorted(spec.kernel.arg_names), spec.kernel
