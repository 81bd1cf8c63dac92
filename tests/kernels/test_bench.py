"""The benchmark itself: its baselines compute what the ops compute, its files keep other rows, failures are told."""

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from keeprate_kernels.bench import __main__ as bench
from keeprate_kernels.bench import bars, races, record, report
from keeprate_kernels.bench.machine import Machine

from .checks import DEVICE

MACHINE = Machine(
    "A CPU", "cpu", 1, "2.13", "none", "2026-01-01", "reference", 50.0, {"float32": 100.0}, "0.1 on 1 cores"
)


# calls against baselines that do other work: the price of something the reader knows
OTHER_WORK = {
    *((call, bars.SDPA) for call in (bars.ALL, bars.KNOWN, bars.WINDOW, races.LSE)),
    *((call, "copy") for call in ("quantise", "dequantise")),
    ("quantise", "plain rounding"),
    ("budget 32", bars.FULL),
}


def tensors(result) -> list[torch.Tensor]:
    """What a call returned, as a list without None."""
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


def line(**changes) -> record.Row:
    """A row that was measured."""
    numbers = dict.fromkeys(record.NUMBERS, 1.0) | {"rounds": 3}
    texts = dict.fromkeys(("against", "torch", "triton", "backend", "date", "load", "note"), "x")
    row = record.Row(
        op="token_stats", case="c", shape="b1 h8 g2 n4096 d64", n=4096, dtype="float32", bytes=1, flops=1,
        device="A CPU", kind="cpu", threads=2, copy_gbs=1.0, status=record.OK, **texts, **numbers,
    )  # fmt: skip
    return replace(row, **changes)


def race(calls, **needs) -> record.Race:
    """A race of given calls, the first against the second."""
    first, second = calls
    return record.Race(
        "op", "n1", 1, torch.float32, lambda device: calls, (record.Line("c", first, second, 1, 1),), needs
    )


@pytest.mark.parametrize("op", races.RACES)
def test_baselines_compute_what_the_op_computes(op):
    """A ratio to code that computes something else would be worth nothing."""
    compared = 0
    for quick in races.RACES[op](False, True):
        calls = quick.build(DEVICE)
        for call, baseline in {(line.call, line.against) for line in quick.lines} - OTHER_WORK:
            ours, theirs = tensors(calls[call]()), tensors(calls[baseline]())
            for mine, other in zip(ours, theirs, strict=False):  # a baseline may give the first of our results alone
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
                compared += 1
    assert compared or op == "quantise_kv", "packed codes have no counterpart in plain torch"


def test_a_quick_run_writes_rows_bars_and_both_sections(tmp_path, capsys):
    assert (
        bench.main(["--quick", "--device", "cpu", "--ops", "token_stats", "--out", str(tmp_path), "--note", "x y z"])
        == 0
    )
    (file,) = (tmp_path / "bench").iterdir()
    with file.open() as text:
        rows = list(csv.DictReader(text))
    assert {row["op"] for row in rows} == {"token_stats"} and {row["status"] for row in rows} == {"ok"}
    first = rows[0]
    assert float(first["ratio"]) == pytest.approx(float(first["median_ms"]) / float(first["against_ms"]), rel=1e-2)
    assert float(first["memory_mib"]) > 0 and first["torch"] == torch.__version__ and first["device"]
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert "## GPU\n\nNot taken yet" in page and "x y z" in page and "#### token_stats" in page
    assert all(bar.text in page for bar in bars.BARS)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "temporary files are left"


def test_without_out_a_quick_run_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RACES", {"token_stats": races.RACES["token_stats"]})
    assert bench.main(["--quick", "--device", "cpu"]) == 0
    assert not list(tmp_path.iterdir())


def test_an_op_that_fails_has_a_row_and_the_others_run(monkeypatch, tmp_path, capsys):
    def broken(gpu, quick):
        calls = {"ours": lambda: torch.ones(2) @ torch.ones(3), "theirs": lambda: None}
        yield replace(race(calls), op="broken")

    monkeypatch.setattr(bench, "RACES", {"broken": broken, "token_stats": races.RACES["token_stats"]})
    assert bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = report.read(tmp_path)
    failed = [row for row in rows if row.status != record.OK]
    assert len(failed) == 1 and failed[0].status.startswith("error: RuntimeError: ") and failed[0].ratio is None
    assert len(rows) > 1 and "FAILED" in capsys.readouterr().err
    assert failed[0].status in (tmp_path / "BENCHMARKS.md").read_text()


def test_what_cannot_run_here_is_said_and_is_no_error():
    def out_of_memory():
        raise torch.OutOfMemoryError("no")

    def no_compiler():
        raise RuntimeError("no C++ compiler")

    cases = {
        "not run: needs 3 GiB": race({"a": lambda: 1, "b": lambda: 1}, b=3 * 2**30),
        "not run: out of memory": race({"a": lambda: 1, "b": out_of_memory}),
        "not run: torch.compile failed: RuntimeError: no C++ compiler": race(
            {"a": lambda: 1, "compiled b": no_compiler}
        ),
    }
    for status, what in cases.items():
        (row,) = record.run(what, MACHINE, torch.device("cpu"), free=2**30, seconds=0.0, repeats=1)
        assert row.status.startswith(status) and row.ratio is None and row.median_ms is not None


def test_inputs_that_cannot_be_made_are_an_error():
    def build(device):
        raise ValueError("no such op")

    what = replace(race({"a": None, "b": None}), build=build)
    (row,) = record.run(what, MACHINE, torch.device("cpu"), free=2**30)
    assert row.status == "error: ValueError: no such op" and row.median_ms is None


def test_saving_replaces_the_ops_that_ran_and_keeps_the_rest(tmp_path):
    order = ["attention_received", "token_stats"]
    report.save(tmp_path, [line(device="NVIDIA H200", kind="cuda", threads=0)], order)
    report.save(tmp_path, [line(), line(op="attention_received", ratio=None)], order)
    report.save(tmp_path, [line(ratio=2.5), line(case="new")], order)
    rows = report.read(tmp_path)
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == ["a-cpu.csv", "nvidia-h200.csv"]
    mine = [row for row in rows if row.device == "A CPU"]
    assert mine == [line(op="attention_received", ratio=None), line(ratio=2.5), line(case="new")]
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert page.index("## GPU") < page.index("### NVIDIA H200") < page.index("## CPU") and "Not taken yet" not in page


def test_a_file_of_other_columns_is_refused(tmp_path):
    report.write(tmp_path / "bench" / "old.csv", "op,ratio\nx,1\n")
    with pytest.raises(ValueError, match=r"old\.csv: columns"):
        report.read(tmp_path)


def test_bars():
    def found(*rows):
        return {v.bar: v for v in bars.verdicts(list(rows))}

    assert {v.verdict for v in found().values()} == {"not taken"}
    rows = [
        line(op="attention_received", case=f"{bars.ALL}, {mask}", against=bars.SDPA, ratio=ratio, memory_mib=memory)
        for mask, ratio, memory in (("causal", 0.8, 10.0), ("causal", 0.95, 30.0), ("not causal", 0.85, 5.0))
    ]
    cpu = {name: v for name, v in found(*rows).items() if v.device == "A CPU"}
    (causal,) = (v for name, v in cpu.items() if "n 4096, causal" in name)
    (plain,) = (v for name, v in cpu.items() if "n 4096, not causal" in name)
    (memory,) = (v for name, v in cpu.items() if "matrix of all heads" in name)
    assert causal.verdict == "missed" and causal.measured.startswith("0.95 "), "the worst of several shapes counts"
    assert plain.verdict == "met"
    assert memory.measured.startswith(f"{30 / (4 * 8 * 4096**2 / 2**20):.3g} ")
    failed = replace(rows[2], status="error: x", ratio=None)
    assert found(failed)[plain.bar].verdict == "not taken"
    gpu = {
        "device": "G",
        "kind": "cuda",
        "op": "selected_attention",
        "case": f"budget {bars.BUDGET}",
        "against": "full decode",
    }
    steps = [line(n=16384, median_ms=0.1, **gpu), line(n=65536, median_ms=0.4, **gpu)]
    (step,) = (v for v in found(*steps).values() if v.bar.startswith("`selected"))
    assert step.verdict == "missed" and step.measured.startswith("4 ")


def test_every_bar_can_be_taken():
    """The sizes and the names that a bar looks for are among the races of its kind of device."""
    for kind in ("cuda", "cpu"):
        rows = [
            line(op=r.op, case=x.case, against=x.against, shape=r.shape, n=r.n, kind=kind)
            for make in races.RACES.values() for r in make(kind == "cuda", False) for x in r.lines
        ]  # fmt: skip
        missing = [v.bar for v in bars.verdicts(rows) if v.device == "A CPU" and v.verdict == "not taken"]
        assert not missing


def test_runs_without_what_a_gpu_machine_may_lack():
    """Only torch, numpy, pandas and transformers: no datasets, papermill, pydantic, matplotlib or Jupyter."""
    script = """
import sys
for name in ("datasets", "papermill", "pydantic", "matplotlib", "IPython", "seaborn", "nbformat"):
    sys.modules[name] = None
from keeprate_kernels.bench import __main__ as bench
sys.exit(bench.main(["--quick", "--device", "cpu", "--ops", "token_stats"]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
