"""Claims: the files are valid, one function decides, the ledger shows all of them whatever was run."""

import json
from pathlib import Path

import pytest

from keeprate import ledger, project

INTERVAL = (0.1, 0.3)


@pytest.mark.parametrize(
    ("tier", "holds", "effect", "interval", "verdict"),
    [
        ("default", True, 0.2, INTERVAL, "direction only"),
        ("default", True, 0.2, None, "direction only"),
        ("default", False, 0.2, INTERVAL, "not reproduced"),
        ("default", True, 0.2, (-0.1, 0.5), "not reproduced"),
        ("default", True, 0.2, (0.0, 0.5), "not reproduced"),
        ("default", False, -0.2, (-0.3, -0.1), "not reproduced"),
        ("default", False, float("nan"), None, "not reproduced"),
        ("interactive", True, 0.2, INTERVAL, "direction only"),
        ("full", True, 0.2, INTERVAL, "direction only"),
        ("paper", True, 0.2, INTERVAL, "reproduced"),
        ("paper", True, 0.2, None, "direction only"),
        ("paper", True, 0.2, (-0.1, 0.5), "not reproduced"),
        ("smoke", True, 0.2, INTERVAL, "not run"),
    ],
)
def test_verdict(tier, holds, effect, interval, verdict):
    found, reason = ledger.verdict(tier, holds, effect, interval)
    assert found == verdict
    assert reason or verdict == ledger.REPRODUCED


def test_an_interval_that_includes_zero_is_called_inconclusive():
    assert ledger.verdict("paper", True, 0.2, (-0.1, 0.5))[1] == "inconclusive: interval includes 0"


FIELDS = {
    "id": "vit.toy.better",
    "paper": "A Paper",
    "arxiv": "2210.09461",
    "statement": "toys are better",
    "papers_number": None,
    "test": "toy minus none",
    "notebook": "10_vit_toy",
}


def write_claims(*claims: dict, family: str = "vit") -> None:
    Path(f"data/claims/{family}.yaml").write_text(json.dumps(claims))


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([FIELDS, FIELDS], "vit.yaml: vit.toy.better: this id is already used"),
        ([FIELDS | {"id": "kv.toy.better"}], "vit.yaml: kv.toy.better: ids in this file begin with 'vit.'"),
        ([FIELDS | {"arxiv": 2210.09461}], "vit.yaml: vit.toy.better: arxiv: Input should be a valid string"),
        ([{k: v for k, v in FIELDS.items() if k != "test"}], "vit.yaml: vit.toy.better: test: Field required"),
        ([FIELDS | {"notebok": "x"}], "vit.yaml: vit.toy.better: notebok: Extra inputs are not permitted"),
        (["text"], "vit.yaml: entry 1"),
    ],
)
def test_bad_claims_name_file_and_id(toy, claims, message):
    write_claims(*claims)
    with pytest.raises(ValueError, match=message):
        ledger.load_claims()


def write_run(tier: str, status: str = "ok", **claim) -> None:
    folder = Path("runs/10_vit_toy", f"{tier}-00000000")
    checked = {"id": "vit.toy.better", "verdict": "direction only", "effect": 0.2, "interval": [0.1, 0.3]}
    checked |= {"n_seeds": 5, "reason": "small embedded model"} | claim
    peak = {"process": 1.0}
    project.write_json(folder / "results.json", {"claims": [checked], "device": "cpu", "peak_memory_gb": peak})
    project.write_json(
        ledger.status_path(Path("runs"), "10_vit_toy", tier), {"status": status, "run": folder.name, "minutes": 1.0}
    )


def test_ledger_shows_what_was_not_run(toy):
    write_claims(FIELDS, FIELDS | {"id": "vit.toy.unseen"})
    assert "* not run: 2" in ledger.to_markdown(ledger.build("runs"))
    write_run("default")
    table = ledger.build("runs").set_index("claim")
    assert table.verdict.to_dict() == {"vit.toy.better": "direction only", "vit.toy.unseen": "not run"}
    assert table.loc["vit.toy.better", ["effect", "low", "high", "seeds", "tier"]].tolist() == [
        0.2,
        0.1,
        0.3,
        5,
        "default",
    ]
    page = ledger.to_markdown(ledger.build("runs"))
    assert "* not run: 1" in page and "+0.2 [+0.1, +0.3]" in page and "arXiv 2210.09461" in page


def test_the_paper_tier_counts_before_the_default_tier_and_failed_runs_do_not_count(toy):
    write_claims(FIELDS)
    write_run("default")
    write_run("paper", verdict="reproduced", reason="")
    assert ledger.build("runs").verdict.tolist() == ["reproduced"]
    write_run("paper", status="failed", verdict="reproduced")
    assert ledger.build("runs").tier.tolist() == ["default"]
    write_run("default", status="interrupted")
    assert ledger.build("runs").verdict.tolist() == ["not run"]


def test_the_stored_full_tier_counts_before_the_default_tier(toy):
    write_claims(FIELDS)
    write_run("default")
    told = {"id": "vit.toy.better", "verdict": "not reproduced", "effect": -0.1, "interval": [-0.2, -0.05]}
    kept = {"device": "cpu", "claims": [told | {"n_seeds": 5, "reason": "the test failed"}]}
    project.write_json(Path("data/expected/10_vit_toy.full.cpu.json"), kept)
    found = ledger.build("runs").iloc[0]
    assert (found.verdict, found.tier, found.seeds) == ("not reproduced", "full", 5)
    write_run("full", verdict="direction only", n_seeds=3)  # a run of one's own counts before what is stored
    assert ledger.build("runs")[["verdict", "tier", "seeds"]].to_numpy().tolist() == [["direction only", "full", 3]]


def test_an_empty_project_has_an_empty_ledger(toy):
    assert ledger.to_markdown(ledger.build("runs")).startswith("# Claims ledger")
    assert ledger.summary(Path("runs"), "default", ["10_vit_toy"]).status.tolist() == ["never run"]


def test_claims_papers_and_manifest_of_this_repository_agree(root, monkeypatch):
    monkeypatch.chdir(root)
    papers = {paper["arxiv"]: paper["title"] for paper in project.read_yaml(root / "data" / "papers.yaml").values()}
    notebooks = project.manifest()
    for claim in ledger.load_claims().values():
        assert papers[claim.arxiv] == claim.paper, claim.id
        assert claim.notebook in notebooks, claim.id
    for name, entry in notebooks.items():
        assert set(entry.papers) <= papers.keys(), f"{name}: add the papers to data/papers.yaml"
