"""Start and finish of a notebook run: parameters checked, seeds set, results written once, at the end.

>>> run = kr.start("10_vit_pruning", globals())
>>> run.metric("accuracy", 0.97, interval=(0.95, 0.98), tolerance=0.01)
>>> run.figure("accuracy_vs_flops", fig, data=frame, tolerance=0.02)
>>> run.claim("vit.tome.merge_beats_drop", holds=True, effect=0.03, interval=(0.01, 0.05), n_seeds=5)
>>> run.finish()
"""

import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
import torch

from keeprate import expected, ledger, project
from keeprate.check import unknown

SCHEMA_VERSION = 1
PACKAGES = (
    "keeprate",
    "torch",
    "triton",
    "transformers",
    "datasets",
    "numpy",
    "pandas",
    "scikit-learn",
    "scikit-image",
)
LITERALS = (bool, int, float, str, list, tuple, dict, NoneType)
IPYTHON_NAMES = ("In", "Out")


@dataclass
class Run:
    """One run of one notebook; `start` makes it.

    Attributes:
        notebook: its name.
        tier: `smoke`, `default`, `full` or `paper`; `interactive` when nobody chose one.
        params: every declared parameter with the value of this run.
        seed: the parameter `seed`, 0 where none is declared; already given to python, numpy and torch.
        device: where to compute.
        dir: where the results go.
    """

    notebook: str
    tier: str
    params: dict[str, Any]
    seed: int
    device: torch.device
    dir: Path
    _started: float = field(default_factory=time.time, repr=False)
    _timings: dict[str, list[float]] = field(default_factory=dict, repr=False)
    _metrics: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _figures: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _claims: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def metric(
        self,
        name: str,
        value: float,
        interval: tuple[float, float] | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Record one number.

        Args:
            name: its name in results.json; recording a name again replaces it.
            value: the number; NaN and infinity become null with a note.
            interval: (low, high) over seeds or samples.
            tolerance: the absolute difference from data/expected that is no drift, chosen from the spread over seeds.
                None: the number is never compared, as for times and memory.
        """
        self._metrics[name] = {
            "value": _number(value),
            "interval": _interval(f"metric {name!r}", interval),
            "tolerance": None if tolerance is None else float(tolerance),
        }
        if not math.isfinite(value):
            self._metrics[name]["note"] = f"was {float(value)}"

    def figure(
        self,
        name: str,
        fig: Any,
        data: pd.DataFrame | None = None,
        tolerance: float | Mapping[str, float] | None = None,
    ) -> None:
        """Save a figure to figures/<name>.svg and the data behind it to results.json.

        Args:
            name: file name without suffix.
            fig: a matplotlib figure, or anything else with its `savefig`.
            data: the numbers it shows; None for pictures that show no table.
            tolerance: as for `metric`, for all columns or by column name; columns that are not named are not compared.

        Raises:
            ValueError: `fig` cannot be saved, or `data` is not a DataFrame, or lacks a column named in `tolerance`.
        """
        if not hasattr(fig, "savefig"):
            raise ValueError(f"figure {name!r}: needs a matplotlib figure, got a {type(fig).__name__}")
        if data is not None and not isinstance(data, pd.DataFrame):
            raise ValueError(f"figure {name!r}: data must be a pandas DataFrame, is a {type(data).__name__}")
        if tolerance is not None and data is None:
            raise ValueError(f"figure {name!r}: a tolerance needs data to compare")
        for column in tolerance if isinstance(tolerance, Mapping) else ():
            if column not in data.columns:
                raise ValueError(f"figure {name!r}: {unknown('column', column, map(str, data.columns))}")
        path = self.dir / "figures" / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        fig.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
        os.replace(temporary, path)
        self._figures[name] = {
            "file": f"figures/{path.name}",
            "data": None if data is None else json.loads(data.to_json(orient="split", index=False)),
            "tolerance": dict(tolerance) if isinstance(tolerance, Mapping) else tolerance,
        }

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time a block, waiting for the GPU at both ends; a name used again adds a second time beside the first."""
        _wait(self.device)
        begin = time.perf_counter()
        yield
        _wait(self.device)
        self._timings.setdefault(name, []).append(time.perf_counter() - begin)

    def claim(
        self,
        id: str,
        *,
        holds: bool,
        effect: float,
        interval: tuple[float, float] | None = None,
        n_seeds: int = 1,
        detail: str = "",
    ) -> str:
        """Say what came of one claim of data/claims.

        Args:
            id: the claim's id.
            holds: whether the claim's test passed.
            effect: by how much, positive in the claim's favour.
            interval: the effect's (low, high) over seeds or samples.
            n_seeds: number of seeds behind it.
            detail: one sentence for the reader of the ledger.

        Returns:
            The verdict.

        Raises:
            ValueError: an id that does not exist or belongs to another notebook, or `holds` with an effect that is not
                positive.
        """
        claims = ledger.load_claims()
        own = [name for name, claim in claims.items() if claim.notebook == self.notebook]
        if id not in claims:
            raise ValueError(unknown("claim", id, own))
        if id not in own:
            raise ValueError(f"claim {id!r} belongs to the notebook {claims[id].notebook}, this is {self.notebook}")
        if holds and not effect > 0:
            raise ValueError(f"claim {id!r} holds, but its effect is {effect}: must be positive in the claim's favour")
        bounds = _interval(f"claim {id!r}", interval)
        verdict, reason = ledger.verdict(self.tier, bool(holds), float(effect), bounds)
        self._claims[id] = {
            "id": id,
            "verdict": verdict,
            "reason": reason,
            "holds": bool(holds),
            "effect": _number(effect),
            "interval": bounds,
            "n_seeds": int(n_seeds),
            "detail": detail,
        }
        return verdict

    def finish(self) -> pd.DataFrame:
        """Write results.json, print what drifted from the expected numbers.

        Returns:
            The verdict on every claim of this notebook, those it did not check included.
        """
        for name, claim in ledger.load_claims().items():
            if claim.notebook == self.notebook and name not in self._claims:
                print(f"!! claim {name} was not checked")
                self._claims[name] = {
                    "id": name,
                    "verdict": ledger.NOT_RUN,
                    "reason": "the notebook did not check it",
                    "holds": None,
                    "effect": None,
                    "interval": None,
                    "n_seeds": None,
                    "detail": "",
                }
        results = self._results()
        results["drift"], text = expected.report(results)
        project.write_json(self.dir / "results.json", results)
        print(text)
        print(f"results: {self.dir / 'results.json'}")
        rows = [
            {
                "claim": c["id"],
                "verdict": c["verdict"],
                "effect": ledger.effect_text(c["effect"], c["interval"]),
                "seeds": c["n_seeds"],
                "reason": c["reason"],
                "detail": c["detail"],
            }
            for c in self._claims.values()
        ]
        return pd.DataFrame(rows, columns=["claim", "verdict", "effect", "seeds", "reason", "detail"])

    def _results(self) -> dict[str, Any]:
        """Everything results.json holds except the drift."""
        cuda = self.device.type == "cuda"
        # Peak resident memory comes in KiB, on macOS in bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = {"process": round(resident / 2**30, 3)}
        if cuda:
            memory["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return {
            "schema_version": SCHEMA_VERSION,
            "notebook": self.notebook,
            "tier": self.tier,
            "parameters": self.params,
            "seed": self.seed,
            "device": self.device.type,
            "device_name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 1),
            "git": _git(),
            "code": project.code_digest(self.notebook),
            "versions": _versions(),
            "timings": self._timings,
            "peak_memory_gb": memory,
            "metrics": self._metrics,
            "claims": list(self._claims.values()),
            "figures": self._figures,
        }


def start(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Begin a run: check the parameters, set the seeds, pick the device, say all of it in two lines.

    Call it right after the imports: any public plain literal that the namespace holds by then is taken for a parameter,
    since that is how a misspelled one arrives.

    Args:
        notebook: the notebook's file name without suffix.
        namespace: the notebook's `globals()`.

    Returns:
        The run, to record results on.

    Raises:
        ValueError: no such notebook, a parameter that it does not declare, a value of the wrong type, or a notebook
            that needs a GPU where there is none.
    """
    declared = project.declared(project.notebook_path(notebook))
    # A namespace that holds a Run is an interactive session that runs this cell again: its other variables are its own.
    again = any(isinstance(value, Run) for value in namespace.values())
    given = {n: v for n, v in namespace.items() if n in declared or (not again and _is_literal(n, v))}
    params = project.resolve(declared, given, notebook)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entry = project.manifest().get(notebook)
    if entry is not None and entry.needs == "gpu" and device.type != "cuda":
        raise ValueError(f"{notebook} needs a GPU, and torch {torch.__version__} sees none on this machine")
    seed = params.get("seed", 0)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    tier = os.environ.get("KEEPRATE_TIER", "interactive")
    folder = project.root() / "runs" / notebook / f"{tier}-{project.digest(params)}"
    folder = Path(os.environ.get("KEEPRATE_RUN_DIR", folder))
    project.discard(folder)
    versions = _versions()
    print(
        f"{notebook} · tier {tier} · {device} ({torch.get_num_threads()} threads) · "
        + ", ".join(f"{name} {versions[name]}" for name in ("python", "keeprate", "torch", "transformers"))
    )
    print(", ".join(f"{name}={value!r}" for name, value in params.items()) or "no parameters")
    return Run(notebook, tier, params, seed, device, folder)


def _is_literal(name: str, value: Any) -> bool:
    """Whether a global looks like a parameter: public, and of a type that a literal has."""
    return not name.startswith("_") and name not in IPYTHON_NAMES and type(value) in LITERALS


def _number(value: float) -> float | None:
    """A finite number as JSON takes it, None for the others."""
    return float(value) if math.isfinite(value) else None


def _interval(what: str, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Check an interval; one with an end that is not finite is none."""
    if interval is None:
        return None
    low, high = map(float, interval)
    if low > high:
        raise ValueError(f"{what}: interval is (low, high), got ({low}, {high})")
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _wait(device: torch.device) -> None:
    """Let the GPU finish what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions() -> dict[str, str | None]:
    """Versions of python and of the packages whose change can move a number; None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git() -> dict[str, Any] | None:
    """Commit of the project's folder and whether files differ from it, None where git cannot tell."""
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        sha, changes = (
            subprocess.run(["git", *c], cwd=project.root(), capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha, "dirty": bool(changes)}
