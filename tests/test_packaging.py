"""What a stranger installs: three lists of versions that agree, two packages, one entry point, no trap on the path."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from papermill.engines import NBClientEngine

FIND_KERNELS = "from importlib.util import find_spec; print(find_spec('kernels'))"


def pins(lines: list[str]) -> dict[str, str]:
    """Package name to exact version."""
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    assert all(str(r.specifier).startswith("==") for r in requirements)
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def lock(root: Path) -> dict[str, str]:
    return pins((root / "requirements.lock").read_text().splitlines())


def test_pyproject_admits_the_lock(project: dict, lock: dict[str, str]):
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        version = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} does not admit the locked {version}"


def test_environment_has_the_pins_of_the_lock(root: Path, lock: dict[str, str], project: dict):
    conda = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pins(pip) == lock, "run `make lock`, which writes both"
    (python,) = (entry.removeprefix("python=") for entry in conda if str(entry).startswith("python="))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)


def test_torch_is_asked_for_by_a_version_that_has_a_cpu_wheel(lock: dict[str, str]):
    assert lock["torch"] == "2.13.0"


def test_papermill_engine_entry_point(project: dict):
    value = project["entry-points"]["papermill.engine"]["keeprate"]
    assert issubclass(EntryPoint("keeprate", value, "papermill.engine").load(), NBClientEngine)


def test_every_package_is_installed(root: Path):
    from setuptools import find_packages

    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {package for source in tool["packages"]["find"]["where"] for package in find_packages(str(root / source))}
    assert {"keeprate", "keeprate_kernels"} <= found
    assert {package.split(".")[0] for package in found} == set(tool["package-dir"])
    modules = {path.parent for source in ("lib", "kernels") for path in (root / source).rglob("*.py")}
    missing = [str(folder) for folder in modules if not (folder / "__init__.py").is_file()]
    assert not missing, f"folders without __init__.py are left out of an installation: {missing}"


def test_our_kernels_folder_does_not_pass_for_the_package_of_that_name(root: Path):
    """transformers looks for a package `kernels`; the repository root on sys.path would offer it our folder."""
    assert str(root) not in map(os.path.abspath, sys.path)
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is not None
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / source) for source in ("lib", "kernels"))}
    environment.pop("PYTHONSAFEPATH", None)  # the Makefile's

    def find(*arguments: str) -> str:
        command = [sys.executable, *arguments, "-c", FIND_KERNELS]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout

    assert str(root) in find(), "without -P the trap is there, else this test tests nothing"
    assert str(root) not in find("-P")
