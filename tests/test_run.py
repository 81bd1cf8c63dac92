"""A run's promises: parameters are checked, results are complete and written once, nothing stale or partial remains."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
import pytest
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

from keeprate import execute, expected, ledger, project
from keeprate import run as keeprate_run

NAME = "10_vit_toy"
CLAIM = """
- id: vit.toy.{what}
  paper: A Paper
  arxiv: "2210.09461"
  statement: toys are better
  papers_number: null
  test: toy minus none, above 0
  notebook: {notebook}
"""


def start(**names) -> keeprate_run.Run:
    return keeprate_run.start(NAME, names)


def results(run: keeprate_run.Run) -> dict:
    return json.loads((run.dir / "results.json").read_text(), parse_constant=pytest.fail)


# ---------------------------------------------------------------------------------------------------------- parameters


def test_defaults_are_filled_in_and_recorded(toy):
    toy(NAME)
    run = start(keep=0.5)
    assert run.params == {"keep": 0.5, "seed": 0} and run.seed == 0 and run.tier == "interactive"
    run.finish()
    assert results(run)["parameters"] == run.params
    assert run.dir.name == f"interactive-{project.digest(run.params)}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kep": 0.5}, r"unknown parameter 'kep', did you mean 'keep'\? Allowed: keep, seed"),
        ({"keep": "0.5"}, r"'keep' must be float, got '0.5' \(str\)"),
        ({"keep": True}, r"'keep' must be float, got True \(bool\)"),
        ({"seed": 1.0}, r"'seed' must be int, got 1.0 \(float\)"),
        ({"keep": None}, r"'keep' must be float"),
    ],
)
def test_bad_parameters(toy, given, message):
    toy(NAME)
    with pytest.raises(ValueError, match=message):
        start(**given)


def test_what_a_notebook_holds_besides_parameters_is_no_parameter(toy):
    toy(NAME)
    run = start(keep=1, _private=3, In=["code"], Out={}, torch=torch, function=len)
    assert run.params["keep"] == 1.0 and type(run.params["keep"]) is float
    again = start(keep=0.5, accuracy=0.9, run=run)  # the cell is run a second time in a session that went on
    assert again.params["keep"] == 0.5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("keep = 0.5", "is not `name: type = literal`"),
        ("keep: float = 1 / 3", "is computed"),
        ("keep: float = 'half'", "must be float"),
        ("keep: torch.Tensor = 1", "is not made of"),
    ],
)
def test_declarations_that_are_no_typed_literals(toy, parameters, message):
    toy(NAME, parameters=parameters)
    with pytest.raises(ValueError, match=message):
        start()


def test_lists_and_optional_values(toy):
    toy(NAME, parameters="keeps: list[float] = [0.5, 1]\nlimit: int | None = None")
    assert start(limit=3).params == {"keeps": [0.5, 1.0], "limit": 3}
    with pytest.raises(ValueError, match=r"'keeps' must be list\[float\]"):
        start(keeps=["a"])


def test_unknown_notebook(toy):
    toy(NAME)
    with pytest.raises(ValueError, match=r"unknown notebook '10_vit_tyo', did you mean '10_vit_toy'"):
        keeprate_run.start("10_vit_tyo", {})


def test_seeds(toy):
    toy(NAME)
    start(seed=7)
    first = torch.rand(3)
    start(seed=7)
    assert torch.equal(first, torch.rand(3))


def test_a_gpu_notebook_says_that_there_is_none(toy, monkeypatch):
    path = toy(NAME).with_name("manifest.yaml")
    path.write_text(path.read_text().replace("family: toy", "family: toy\n  needs: gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        start()


# ------------------------------------------------------------------------------------------------------------- results


def test_results_are_complete_and_standard_json(toy):
    toy(NAME)
    Path("data/claims/vit.yaml").write_text(CLAIM.format(what="better", notebook=NAME))
    run = start()
    run.metric("accuracy", torch.tensor(0.5), interval=(0.4, 0.6), tolerance=0.1)
    run.metric("undefined", float("nan"))
    with run.timer("loop"):
        pass
    fig, _ = plt.subplots()
    run.figure("curve", fig, data=pd.DataFrame({"keep": [0.5, 1.0], "loss": [math.inf, 0.1]}), tolerance={"keep": 0})
    verdict = run.claim("vit.toy.better", holds=True, effect=0.2, interval=(0.1, 0.3), n_seeds=5)
    table = run.finish()
    found = results(run)
    assert found["metrics"]["accuracy"] == {"value": 0.5, "interval": [0.4, 0.6], "tolerance": 0.1}
    assert found["metrics"]["undefined"]["value"] is None and found["metrics"]["undefined"]["note"] == "was nan"
    assert found["figures"]["curve"]["data"] == {"columns": ["keep", "loss"], "data": [[0.5, None], [1.0, 0.1]]}
    assert (run.dir / found["figures"]["curve"]["file"]).read_text().startswith("<?xml")
    assert len(found["timings"]["loop"]) == 1 and found["peak_memory_gb"]["process"] > 0
    assert found["versions"]["torch"] and found["code"] and found["schema_version"] == keeprate_run.SCHEMA_VERSION
    assert verdict == found["claims"][0]["verdict"] == ledger.DIRECTION_ONLY
    assert list(table.claim) == ["vit.toy.better"]
    assert not [p for p in run.dir.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]


def test_a_run_leaves_nothing_old_behind(toy):
    toy(NAME)
    run = start()
    fig, _ = plt.subplots()
    run.figure("curve", fig)
    run.finish()
    assert start().dir == run.dir
    assert not (run.dir / "results.json").exists() and not (run.dir / "figures").exists()


def test_a_claim_that_was_not_checked_is_shown(toy, capsys):
    toy(NAME)
    Path("data/claims/vit.yaml").write_text(CLAIM.format(what="better", notebook=NAME))
    table = start().finish()
    assert list(table.verdict) == [ledger.NOT_RUN]
    assert "vit.toy.better was not checked" in capsys.readouterr().out


def test_bad_claims_and_figures(toy):
    toy(NAME)
    claims = CLAIM.format(what="better", notebook=NAME) + CLAIM.format(what="other", notebook="20_else")
    Path("data/claims/vit.yaml").write_text(claims)
    run = start()
    with pytest.raises(ValueError, match=r"unknown claim 'vit.toy.beter', did you mean 'vit.toy.better'"):
        run.claim("vit.toy.beter", holds=True, effect=1)
    with pytest.raises(ValueError, match="belongs to the notebook 20_else"):
        run.claim("vit.toy.other", holds=True, effect=1)
    with pytest.raises(ValueError, match="must be positive in the claim's favour"):
        run.claim("vit.toy.better", holds=True, effect=-0.1)
    with pytest.raises(ValueError, match=r"interval is \(low, high\)"):
        run.claim("vit.toy.better", holds=True, effect=0.1, interval=(0.2, 0.1))
    with pytest.raises(ValueError, match="needs a matplotlib figure, got a list"):
        run.figure("curve", [])
    with pytest.raises(ValueError, match="unknown column 'los', did you mean 'loss'"):
        run.figure("curve", plt.figure(), data=pd.DataFrame({"loss": [1.0]}), tolerance={"los": 1})


# --------------------------------------------------------------------------------------------------------------- drift


def test_drift_names_old_new_and_origin(toy, capsys):
    toy(NAME)

    def finished(accuracy: float, loss: float, **names) -> dict:
        run = start(**names)
        run.metric("accuracy", accuracy, tolerance=0.01)
        run.metric("seconds", accuracy)
        run.figure("curve", plt.figure(), pd.DataFrame({"n": ["a"], "loss": [loss]}), tolerance={"loss": 0.1})
        run.finish()
        return results(run)

    assert finished(0.9, 1.0)["drift"] == []
    stored = finished(0.9, 1.0) | {"tier": "default"}
    assert "stored" in expected.update(stored)
    assert finished(0.905, 1.05)["drift"] == []
    capsys.readouterr()
    drift = finished(0.8, 2.0)["drift"]
    assert len(drift) == 2
    assert drift[0] == "metric accuracy: 0.9 -> 0.8 (tolerance 0.01)" and "1.0 -> 2.0" in drift[1]
    assert "!! DRIFT" in capsys.readouterr().out
    assert finished(0.8, 2.0, keep=0.5)["drift"] == []  # other parameters, other numbers
    changed = stored | {"versions": stored["versions"] | {"torch": "1.0"}, "code": "00000000"}
    assert "torch" in expected.origin(changed, expected.read(stored)) and "code" in expected.origin(changed, stored)
    assert "accuracy: 0.9 -> 0.8" in expected.update(finished(0.8, 2.0) | {"tier": "default"})


# -------------------------------------------------------------------------------------- through papermill and Snakemake


def test_snakemake_runs_them_all_and_a_failed_notebook_stops_no_other(toy, root):
    """Two kernels at once through the real Snakefile; then only the failed one is left to do."""
    source = toy(
        NAME,
        "import os\nfrom importlib.util import find_spec\n\n"
        "spec = find_spec('kernels')  # the trap: our folder kernels/ taken for that package\n"
        "run.metric('trap', float(spec is not None and spec.origin is None))\n"
        "run.metric('offline', float(os.environ['HF_HUB_OFFLINE']))",
        "run.finish()",
    )
    toy("11_vit_bad", "raise RuntimeError('on purpose')", start="")
    Path("data/tiers/smoke", f"{NAME}.yaml").write_text("keep: 1\n")
    Path("data/tiers/smoke/11_vit_bad.yaml").touch()

    def snakemake(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-m", "snakemake", "-s", str(root / "Snakefile"), "-c", "2", "--nolock"]
        command += ["--keep-going", *options, "--config", "tier=smoke", "notebooks="]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = snakemake()
    assert done.returncode != 0 and "11_vit_bad: FAILED: RuntimeError: on purpose" in done.stderr, done.stderr
    status = ledger.read_status(Path("runs"), NAME, "smoke")
    assert status["status"] == "ok" and Path("runs", NAME, "smoke.done").exists(), done.stderr
    found = ledger.read_results(Path("runs"), NAME, "smoke")
    assert found["parameters"] == {"keep": 1.0, "seed": 0} and found["tier"] == "smoke" and found["threads"] == 1
    assert found["metrics"]["trap"]["value"] == 0 and found["metrics"]["offline"]["value"] == 1
    before, after = (nbformat.read(p, 4) for p in (source, Path("runs", NAME, status["run"], source.name)))
    assert {c.id for c in before.cells} <= {c.id for c in after.cells}
    left = snakemake("--dry-run").stdout
    assert "runs/11_vit_bad/smoke.done" in left and f"runs/{NAME}/smoke.done\n    jobid" not in left, left


def test_a_failed_notebook_keeps_its_copy_and_no_results(toy, monkeypatch):
    toy(NAME, "raise RuntimeError('on purpose')", start="run = 1")
    folder = Path("runs", NAME, f"default-{project.digest({'keep': 0.25, 'seed': 0})}")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    Path("runs", NAME, "default.done").touch()
    with pytest.raises(execute.RunFailed, match=r"RuntimeError: on purpose\nexecuted copy: .*failed.ipynb"):
        execute.execute(NAME, "default", Path("runs"))
    assert [p.name for p in folder.iterdir()] == ["failed.ipynb"]
    assert not Path("runs", NAME, "default.done").exists()
    status = ledger.read_status(Path("runs"), NAME, "default")
    assert status["status"] == "failed" and "on purpose" in status["error"]


@pytest.mark.parametrize(
    ("tier", "content", "message"),
    [
        ("smoke", None, r"no tier file .*smoke/10_vit_toy.yaml; 10_vit_toy has the tiers: default"),
        ("papr", None, "unknown tier 'papr', did you mean 'paper'"),
        ("paper", "kep: 0.5", r"paper/10_vit_toy.yaml: unknown parameter 'kep', did you mean 'keep'"),
        ("paper", "keep: half", r"paper/10_vit_toy.yaml: parameter 'keep' must be float, got 'half'"),
        ("paper", "- keep", "must map parameter names to values, is a list"),
        ("paper", "keep: [", "paper/10_vit_toy.yaml: not valid YAML"),
    ],
)
def test_bad_tiers_fail_before_a_kernel_starts(toy, tier, content, message):
    toy(NAME)
    if content is not None:
        Path("data/tiers", tier, f"{NAME}.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        execute.execute(NAME, tier, Path("runs"))
    assert not list(Path("runs", NAME).glob("*-*"))


def test_expected_values_are_updated_from_successful_runs_only(toy):
    toy(NAME)
    with pytest.raises(ValueError, match=f"{NAME} has no successful run of the default tier"):
        execute.update_expected([NAME], "default", Path("runs"))
