"""Time every op against what it replaces; write kernels/bench/<device>.csv and kernels/BENCHMARKS.md."""

import argparse
import sys
import time
from pathlib import Path

import torch

from keeprate_kernels.bench import machine, record, report
from keeprate_kernels.bench.races import RACES

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the races and say how the bars stand.

    Args:
        arguments: Of the command line.

    Returns:
        1 if an op or a baseline failed (its rows say how), else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m keeprate_kernels.bench", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=sorted(RACES), help="only these; rows of the others stay")
    parser.add_argument("--device", help="cpu or cuda; a GPU where there is one by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: does it run? writes only with --out")
    parser.add_argument("--note", default="", help="what else the machine was doing; stands beside the rows")
    parser.add_argument("--out", type=Path, help="in place of the folder kernels/")
    options = parser.parse_args(arguments)
    if options.out is None and not options.quick and not (ROOT.parent / "pyproject.toml").is_file():
        parser.error("--out is needed: this package was installed without its repository")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ops = [op for op in RACES if not options.ops or op in options.ops]
    rows = measure(ops, device, options.quick, options.note)
    folder = options.out or (None if options.quick else ROOT)
    print(f"\n{report.bars_table(rows)}\n")
    if folder is not None:
        print(f"rows: {report.save(folder, rows, RACES)}\ntable: {folder / 'BENCHMARKS.md'}")
    failed = [row for row in rows if row.status.startswith("error")]
    for row in failed:
        print(f"FAILED {row.op}, {row.case}, {row.shape}, against {row.against}: {row.status}", file=sys.stderr)
    return int(bool(failed))


def measure(ops: list[str], device: torch.device, quick: bool, note: str) -> list[record.Row]:
    """The rows of some ops, printed while they come."""
    begin, rows = time.perf_counter(), []
    here = machine.measure(device, quick)
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in here.matmul_gflops.items())
    print(f"{here.device}, torch {here.torch}, triton {here.triton}, {here.backend}; {here.threads} threads")
    print(f"copy {here.copy_gbs:.1f} GB/s, matrix products {rates}; load {here.load}\n")
    gpu = device.type == "cuda"
    for op in ops:
        for race in RACES[op](gpu, quick):
            free = int(machine.free_bytes(device) * (0.85 if gpu else 0.5))
            timing = {"seconds": 0.0, "repeats": 1} if quick else {"seconds": 2.0 if gpu else 4.0, "repeats": 30}
            for row in record.run(race, here, device, free, **timing, note=note):
                result = f"{row.ratio:8.3f}" if row.ratio is not None else f"  {row.status}"
                print(
                    f"{time.perf_counter() - begin:5.0f} s  {op:20} {result}  {row.case}, {row.shape} / {row.against}"
                )
                rows.append(row)
            if gpu:
                torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(main())
