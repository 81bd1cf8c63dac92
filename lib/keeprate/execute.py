"""Execute one notebook of the project through papermill: `python -m keeprate.execute 10_vit_pruning --tier default`.

What it leaves in `<out>/<notebook>/`:
    <tier>.json                     how the latest run of this tier went, and in which folder
    <tier>.done                     there only when that run succeeded; Snakemake looks at it
    <tier>-<hash of parameters>/    the executed notebook (`failed.ipynb` if it failed), results.json, figures/
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import papermill_engines
from papermill.exceptions import PapermillExecutionError

from keeprate import expected, ledger, project
from keeprate.engine import IPCEngine

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
QUIET = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class RunFailed(Exception):
    """A notebook that did not get to its end, or whose results are not acceptable."""


def execute(notebook: str, tier: str, out: Path, gpus: str | None = None, strict_drift: bool = False) -> Path:
    """Run a notebook with the parameters of a tier.

    Args:
        notebook: its name, or a path to it.
        tier: `smoke`, `default`, `full` or `paper`.
        out: folder of all runs.
        gpus: the GPUs it may see, as in CUDA_VISIBLE_DEVICES; None: all.
        strict_drift: whether numbers that drifted from data/expected make the run fail.

    Returns:
        The folder with the run's results.

    Raises:
        ValueError: no such notebook or tier, or a tier file that does not fit the notebook.
        RunFailed: a cell raised, the notebook never finished its run, or its numbers drifted under `strict_drift`.
    """
    source = project.notebook_path(notebook)
    with _alone(out / source.stem), _status(out, source.stem, tier) as status:
        parameters = project.tier_parameters(source.stem, tier)
        folder = out.resolve() / source.stem / f"{tier}-{project.digest(parameters)}"
        folder.mkdir(parents=True, exist_ok=True)
        status["run"] = folder.name
        project.discard(folder)
        failed, executed = folder / "failed.ipynb", folder / source.name
        executed.unlink(missing_ok=True)
        os.environ.update({"KEEPRATE_RUN_DIR": str(folder), "KEEPRATE_TIER": tier, "JUPYTER_PREFER_ENV_PATH": "1"})
        os.environ.update(dict.fromkeys(QUIET, "1"))
        if tier != "paper":
            os.environ.update(dict.fromkeys(OFFLINE, "1"))
        papermill_engines.register("keeprate", IPCEngine)
        try:
            papermill.execute_notebook(
                source,
                failed,
                parameters=parameters,
                engine_name="keeprate",
                kernel_name="python3",
                language="python",
                cwd=source.parent,
                progress_bar=False,
                start_timeout=180,
                cuda_visible_devices=gpus,
            )
        except (PapermillExecutionError, DeadKernelError) as error:
            # What the notebook wrote before it failed is no result.
            project.discard(folder)
            what = f"{error.ename}: {error.evalue}" if isinstance(error, PapermillExecutionError) else str(error)
            raise RunFailed(f"{what}\nexecuted copy: {failed}") from None
        _check(folder, source.stem, strict_drift)
        os.replace(failed, executed)
    return folder


def _check(folder: Path, notebook: str, strict_drift: bool) -> None:
    """Demand what a finished run must have left behind."""
    path = folder / "results.json"
    if not path.is_file():
        raise RunFailed(f"the notebook came to its end without `run.finish()`: there is no {path}")
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["notebook"] != notebook:
        raise RunFailed(f"the notebook calls itself {results['notebook']!r} in kr.start, its file is {notebook}.ipynb")
    if strict_drift and results["drift"]:
        raise RunFailed("numbers drifted from data/expected:\n  " + "\n  ".join(results["drift"]))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another run of the same notebook; the lock dies with its process, so none is ever left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.name}: waiting for another run of it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _status(out: Path, notebook: str, tier: str) -> Iterator[dict[str, Any]]:
    """Keep <tier>.json true at every moment: interrupted until the block ends, then ok or failed."""
    path = ledger.status_path(out, notebook, tier)
    done = path.with_suffix(".done")
    done.unlink(missing_ok=True)
    status: dict[str, Any] = {"status": "interrupted"}
    began = time.time()
    project.write_json(path, status)
    try:
        yield status
        status["status"] = "ok"
    except Exception as error:
        status |= {"status": "failed", "error": str(error)}
        raise
    finally:
        status["minutes"] = round((time.time() - began) / 60, 2)
        project.write_json(path, status)
        if status["status"] == "ok":
            done.touch()


def update_expected(notebooks: list[str], tier: str, out: Path) -> None:
    """Store the numbers of the latest runs as the expected ones, showing old and new.

    Raises:
        ValueError: a notebook was named that has no successful run in this tier.
    """
    for notebook in notebooks or list(project.manifest()):
        name = project.notebook_path(notebook).stem
        results = ledger.read_results(out, name, tier)
        if results is None:
            raise ValueError(f"{name} has no successful run of the {tier} tier in {out}: run it first")
        print(expected.update(results))


def main() -> int:
    """Execute one notebook, or store the numbers of the latest runs as the expected ones."""
    parser = argparse.ArgumentParser(prog="python -m keeprate.execute", description=main.__doc__)
    parser.add_argument("notebook", nargs="*", help="name or path; one to execute, any number with --update-expected")
    parser.add_argument("--tier", default="default", help=f"one of {', '.join(project.TIERS)}")
    parser.add_argument("--out", type=Path, default=project.root() / "runs", help="folder of all runs")
    parser.add_argument("--gpus", help="the GPUs it may see, e.g. 0 or 2,3")
    parser.add_argument("--strict-drift", action="store_true", help="fail when numbers differ from data/expected")
    parser.add_argument("--update-expected", action="store_true", help="execute nothing, rewrite data/expected")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end: the kernel is stopped, not orphaned
    names = [Path(name).stem for name in arguments.notebook]
    try:
        if arguments.update_expected:
            update_expected(names, arguments.tier, arguments.out)
            return 0
        if len(names) != 1:
            parser.error(f"name one notebook to execute, got {len(names)}")
        began = time.time()
        print(f"{names[0]}: started, tier {arguments.tier}", flush=True)
        folder = execute(names[0], arguments.tier, arguments.out, arguments.gpus, arguments.strict_drift)
    except (ValueError, RunFailed) as error:
        print(f"{' '.join(names) or 'all notebooks'}: FAILED: {error}", file=sys.stderr)
        return 1
    print(f"{names[0]}: ok after {(time.time() - began) / 60:.1f} minutes, results in {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
