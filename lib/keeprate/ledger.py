"""What the papers claim, and what came of each claim here.

`python -m keeprate.ledger` writes runs/ledger.csv and runs/LEDGER.md.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict

from keeprate import expected, project

REPRODUCED = "reproduced"
DIRECTION_ONLY = "direction only"
NOT_REPRODUCED = "not reproduced"
NOT_RUN = "not run"
VERDICTS = (REPRODUCED, DIRECTION_ONLY, NOT_REPRODUCED, NOT_RUN)
COLUMNS = (
    *("claim", "family", "verdict", "effect", "low", "high", "seeds", "tier", "device", "notebook"),
    *("paper", "arxiv", "papers_number", "statement", "reason"),
)


class Claim(BaseModel):
    """One entry of data/claims/<family>.yaml: what a paper says and how a notebook tests it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    id: str
    """`<family>.<method>.<what>`, e.g. vit.tome.merge_beats_drop."""
    paper: str
    """The paper's title."""
    arxiv: str
    statement: str
    papers_number: str | None
    """The number the paper gives for it, with its setting; null where it gives none."""
    test: str
    """What the notebook measures, and what would count against the claim."""
    notebook: str
    """The notebook that checks it."""


def load_claims() -> dict[str, Claim]:
    """Read data/claims/*.yaml.

    Returns:
        Claim id to claim, in the order of the files.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type, an id is used twice or lies in the wrong file.
    """
    claims: dict[str, Claim] = {}
    for path in sorted((project.root() / "data" / "claims").glob("*.yaml")):
        entries = project.read_yaml(path) or []
        if not isinstance(entries, list):
            raise ValueError(f"{path}: must be a list of claims, is a {type(entries).__name__}")
        for number, fields in enumerate(entries, 1):
            name = fields.get("id", f"entry {number}") if isinstance(fields, dict) else f"entry {number}"
            claim = project.validated(Claim, fields, f"{path}: {name}")
            if claim.id in claims:
                raise ValueError(f"{path}: {claim.id}: this id is already used")
            if not claim.id.startswith(f"{path.stem}."):
                raise ValueError(f"{path}: {claim.id}: ids in this file begin with {path.stem + '.'!r}")
            claims[claim.id] = claim
    return claims


def verdict(tier: str, holds: bool, effect: float, interval: tuple[float, float] | None) -> tuple[str, str]:
    """The one place where a measurement becomes a verdict.

    Args:
        tier: where it was measured. Only `paper` has the papers' models and data, so only it can reproduce a claim;
            `smoke` runs too little to say anything.
        holds: whether the claim's test passed.
        effect: by how much, positive in the claim's favour.
        interval: the effect's interval over seeds or samples, None where there is none.

    Returns:
        The verdict, and the reason for it where it is not plain.
    """
    if tier == "smoke":
        return NOT_RUN, "the smoke tier checks that the notebook runs, not what it finds"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return NOT_REPRODUCED, "inconclusive: interval includes 0"
    if not holds or not effect > 0:
        return NOT_REPRODUCED, "the test failed"
    if tier != "paper":
        return DIRECTION_ONLY, "small embedded model"
    if interval is None:
        return DIRECTION_ONLY, "no interval was measured"
    return REPRODUCED, ""


def status_path(runs: Path, notebook: str, tier: str) -> Path:
    """Where the latest run of a notebook in a tier says how it went and which folder holds its results."""
    return runs / notebook / f"{tier}.json"


def read_status(runs: Path, notebook: str, tier: str) -> dict[str, Any] | None:
    """The latest run of a notebook in a tier, or None if there never was one."""
    path = status_path(runs, notebook, tier)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_results(runs: Path, notebook: str, tier: str) -> dict[str, Any] | None:
    """The results.json of the latest run, or None if there was none or it did not succeed."""
    status = read_status(runs, notebook, tier)
    if status is None or status["status"] != "ok":
        return None
    path = runs / notebook / status["run"] / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def build(runs: Path | str) -> pd.DataFrame:
    """Join every claim with the best evidence for it: the paper tier's run before the full tier's before the default's.

    The full tier takes long and is run once; where there is no run of it, its claims stored in data/expected count.

    Args:
        runs: folder of the runs.

    Returns:
        One row a claim, with the columns COLUMNS; low and high are the ends of the effect's interval.
    """
    rows = []
    for claim in load_claims().values():
        measured: Mapping[str, Any] = {}
        for tier in ("paper", "full", "default"):
            results = read_results(Path(runs), claim.notebook, tier)
            if results is None and tier == "full":
                results = expected.stored(claim.notebook)
            checked = [c for c in results["claims"] if c["id"] == claim.id] if results else []
            if checked and checked[0]["verdict"] != NOT_RUN:
                measured = {**checked[0], "tier": tier, "device": results["device"]}
                break
        low, high = measured.get("interval") or (None, None)
        rows.append(
            {
                "claim": claim.id,
                "family": claim.id.split(".")[0],
                "verdict": measured.get("verdict", NOT_RUN),
                "effect": measured.get("effect"),
                "low": low,
                "high": high,
                "seeds": measured.get("n_seeds"),
                "tier": measured.get("tier"),
                "device": measured.get("device"),
                "notebook": claim.notebook,
                "paper": claim.paper,
                "arxiv": claim.arxiv,
                "papers_number": claim.papers_number,
                "statement": claim.statement,
                "reason": measured.get("reason", "no successful run has checked it"),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def to_markdown(ledger: pd.DataFrame) -> str:
    """The ledger as a page: how many claims got each verdict, then every claim by family.

    Args:
        ledger: what `build` returns.
    """
    lines = ["# Claims ledger", ""]
    lines += [f"* {verdict}: {(ledger.verdict == verdict).sum()}" for verdict in VERDICTS]
    lines += ["", "Effects are positive in the claim's favour. Small embedded models can show a direction, never the"]
    lines += ["paper's number: `reproduced` needs the paper's own model and data (tier `paper`)."]
    for family, claims in ledger.groupby("family"):
        shown = [
            {
                "claim": row.claim,
                "statement": row.statement,
                "paper's number": row.papers_number or "",
                "verdict": f"{row.verdict} ({row.reason})" if row.reason else row.verdict,
                "effect": effect_text(row.effect, (row.low, row.high)),
                "seeds": "" if pd.isna(row.seeds) else row.seeds,
                "where": ", ".join(filter(None, (row.notebook, row.tier, row.device))),
                "source": f"{row.paper} (arXiv {row.arxiv})",
            }
            for row in claims.itertuples()
        ]
        lines += ["", f"## {family}", "", pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True)]
    return "\n".join(lines) + "\n"


def effect_text(effect: float | None, interval: tuple[float | None, float | None] | None) -> str:
    """`+0.031 [+0.012, +0.050]`; empty for what was not measured."""
    if effect is None or pd.isna(effect):
        return ""
    text = f"{effect:+.3g}"
    if interval is None or pd.isna(interval[0]):
        return text
    return f"{text} [{interval[0]:+.3g}, {interval[1]:+.3g}]"


def summary(runs: Path, tier: str, names: list[str]) -> pd.DataFrame:
    """How the latest run of each notebook went: status, minutes, memory, number of claims with each verdict."""
    rows = []
    for name in names:
        status = read_status(runs, name, tier) or {"status": "never run"}
        results = read_results(runs, name, tier) or {"claims": [], "peak_memory_gb": {}}
        counts = {verdict: sum(c["verdict"] == verdict for c in results["claims"]) for verdict in VERDICTS}
        peak = results["peak_memory_gb"].get("process")
        rows.append([name, status["status"], status.get("minutes"), peak, *counts.values(), status.get("run")])
    return pd.DataFrame(rows, columns=["notebook", "status", "minutes", "peak GB", *VERDICTS, "run"], dtype=object)


def main() -> None:
    """Write the ledger from the runs there are, and print how the notebooks of one tier went."""
    parser = argparse.ArgumentParser(prog="python -m keeprate.ledger", description=main.__doc__)
    parser.add_argument("--tier", default="default", choices=project.TIERS)
    parser.add_argument("--runs", type=Path, default=project.root() / "runs")
    parser.add_argument("--notebooks", nargs="*", help="only these in the printed table")
    arguments = parser.parse_args()
    ledger = build(arguments.runs)
    project.write_text(arguments.runs / "ledger.csv", ledger.to_csv(index=False))
    project.write_text(arguments.runs / "LEDGER.md", to_markdown(ledger))
    names = arguments.notebooks or list(project.manifest())
    table = summary(arguments.runs, arguments.tier, names)
    print(f"\n{table.to_markdown(index=False, floatfmt='.2f', missingval='')}\n")
    for name in names:
        status = read_status(arguments.runs, name, arguments.tier) or {}
        if "error" in status:
            print(f"{name} failed: {status['error']}\n")
        drift = (read_results(arguments.runs, name, arguments.tier) or {}).get("drift")
        if drift:
            print("\n  ".join([f"{name} DRIFTED from data/expected:", *drift]) + "\n")
    print(f"results: {arguments.runs}/<notebook>/<run>\nledger of {len(ledger)} claims: {arguments.runs / 'LEDGER.md'}")


if __name__ == "__main__":
    main()
