"""The conventions that every notebook of the folder keeps, and its recipe cells run by a stranger."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keeprate import project

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 40
MOST_PARAMETERS = 8


def tagged(path: Path, tag: str) -> list[str]:
    """Sources of the cells that carry a tag."""
    return [cell["source"] for cell in project.cells(path) if tag in cell["metadata"].get("tags", [])]


def code(path: Path) -> list[str]:
    return [cell["source"] for cell in project.cells(path) if cell["cell_type"] == "code"]


notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_manifest_and_folder_agree(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert list(project.manifest()) == [path.stem for path in NOTEBOOKS]


@notebook
def test_name(path: Path):
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem), "NN_family_topic, lower snake case; NN_family for all of it"


@notebook
def test_title_comes_first(path: Path):
    cells = project.cells(path)
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# ")
    headings = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"].splitlines()]
    assert sum(line.startswith("# ") for line in headings) == 1, "one H1"


@notebook
def test_parameters(path: Path):
    declared = project.declared(path)  # one cell, typed literals only
    assert len(declared) <= MOST_PARAMETERS
    assert not [p.name for p in declared.values() if not p.comment], "every parameter has a comment on its line"


@notebook
def test_parameters_imports_start_and_finish(path: Path):
    parameters, imports, start, *_, last = code(path)
    assert tagged(path, "parameters") == [parameters] and tagged(path, "imports") == [imports]
    assert "kr.start" not in imports, "a cell of its own, so that recipes can follow the imports alone"
    assert f'run = kr.start("{path.stem}", globals())' in start
    assert "run.finish()" in last


@notebook
def test_cells_are_short_and_install_nothing(path: Path):
    for source in code(path):
        assert len(source.splitlines()) <= LONGEST_CELL, source[:80]
        assert not re.search(r"^\s*[%!]\s*(pip|conda)\b", source, re.MULTILINE), source[:80]


@notebook
def test_outputs_are_stripped_and_ids_kept(path: Path):
    cells = project.cells(path)
    assert all(cell.get("id") for cell in cells), "every cell has an id (nbformat 4.5)"
    assert not [c["id"] for c in cells if c.get("outputs") or c.get("execution_count")], "run `make strip`"


@notebook
@pytest.mark.parametrize("tier", project.TIERS)
def test_tiers(path: Path, tier: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    if tier in project.OPTIONAL and not (ROOT / "data" / "tiers" / tier / f"{path.stem}.yaml").is_file():
        pytest.skip(f"no {tier} tier")
    project.tier_parameters(path.stem, tier)


RECIPES = [(path, number) for path in NOTEBOOKS for number in range(len(tagged(path, "recipe")))]


@pytest.mark.parametrize(("path", "number"), RECIPES, ids=[f"{path.stem}-{number}" for path, number in RECIPES])
def test_recipe_runs_alone(path: Path, number: int, tmp_path: Path):
    """A copied cell works in a stranger's folder after nothing but the notebook's imports."""
    script = tmp_path / "recipe.py"
    script.write_text("\n".join([*tagged(path, "imports"), tagged(path, "recipe")[number]]), encoding="utf-8")
    paths = os.pathsep.join(str(ROOT / source) for source in ("lib", "kernels"))
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
