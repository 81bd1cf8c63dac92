"""Rows to kernels/bench/<device>.csv, and all devices' rows to kernels/BENCHMARKS.md."""

import csv
import io
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from keeprate_kernels.bench.bars import verdicts
from keeprate_kernels.bench.record import OK, Row

COLUMNS = [f.name for f in fields(Row)]
KINDS = {"cuda": "GPU", "cpu": "CPU"}
INTRODUCTION = """\
# Benchmarks

Written by `make bench`; edit nothing here. The rows with all their columns stand in `kernels/bench/<device>.csv`.

* **ratio** is the op's time over the time of what it is held `against`, below 1 = faster: median over rounds in which
  both took turns on the same inputs, with quartiles. Times are medians with quartiles.
* **MiB** is the peak of all tensors beyond the inputs, the output included.
* **copy** and **matmul** are the roofline: the least bytes and the least FLOPs that the result needs, over the time, as
  a share of the copy bandwidth and of the matrix-product rate (same dtype) measured in the same run. An op that nears
  100 % of either has nothing left to gain; one far below both is bound by elementwise work, latency or launches.
* On a GPU times are the GPU's own between events, with a cold cache, except for rows against loops of launches, which
  are wall clock. On a CPU times are wall clock with a warm cache.
* `reference`: the plain-torch code that runs where triton does not; `triton`: the kernels.
"""


def file_of(folder: Path, device: str) -> Path:
    """The CSV of a device: its name in lower case with hyphens."""
    return folder / "bench" / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def write(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read(folder: Path) -> list[Row]:
    """All rows of all devices.

    Raises:
        ValueError: If the columns of a file are not those of a row.
    """
    return [row for path in sorted((folder / "bench").glob("*.csv")) for row in read_file(path)]


def read_file(path: Path) -> list[Row]:
    """The rows of one CSV.

    Raises:
        ValueError: If its columns are not those of a row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: columns are not {', '.join(COLUMNS)}; delete the file and take it anew")
        return [_parse(record) for record in reader]


def _parse(record: dict[str, str]) -> Row:
    """A row from its text; an empty cell of a number is None."""
    kinds = typing.get_type_hints(Row)
    values = {}
    for name, text in record.items():
        optional = isinstance(kinds[name], types.UnionType)
        kind = typing.get_args(kinds[name])[0] if optional else kinds[name]
        values[name] = None if optional and text == "" else kind(text)
    return Row(**values)


def save(folder: Path, rows: list[Row], order: Iterable[str]) -> Path:
    """Put rows of one device into its CSV and write BENCHMARKS.md anew.

    Args:
        folder: The folder kernels/.
        rows: Of one device; all rows of the ops they belong to are replaced, those of other ops stay.
        order: The ops' order in the file.

    Returns:
        The CSV.
    """
    path, ops, order = file_of(folder, rows[0].device), {row.op for row in rows}, list(order)
    held = read_file(path) if path.is_file() else []
    rows = [row for row in held if row.op not in ops and row.op in order] + rows
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: order.index(row.op)))
    write(path, text.getvalue())
    write(folder / "BENCHMARKS.md", markdown(read(folder)))
    return path


def table(header: list[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def bars_table(rows: list[Row]) -> str:
    """The acceptance bars against what was measured."""
    header = ["bar", "limit", "device", "measured", ""]
    return table(header, ([v.bar, f"<= {v.limit:g}", v.device, v.measured, v.verdict] for v in verdicts(rows)))


def markdown(rows: list[Row]) -> str:
    """BENCHMARKS.md: how to read it, the bars, then the rows of every GPU and every CPU."""
    parts = [INTRODUCTION, "## Acceptance bars\n", bars_table(rows) + "\n"]
    parts += [f"* {v.bar}: {v.why}\n" for v in verdicts(rows) if v.verdict == "missed" and v.why]
    for kind, title in KINDS.items():
        parts.append(f"## {title}\n")
        mine = [row for row in rows if row.kind == kind]
        if not mine:
            parts.append(f"Not taken yet: no {title} has run `make bench`.\n")
        for device in sorted({row.device for row in mine}):
            parts += [f"### {device}\n", *_device([row for row in mine if row.device == device])]
    return "\n".join(parts)


def _device(rows: list[Row]) -> list[str]:
    """What one device measured, op by op."""
    parts = []
    for op, group in groupby(rows, key=lambda row: row.op):
        part = list(group)
        first = part[0]
        rate = f", matrix products in {first.dtype} {first.matmul_gflops:.0f} GFLOP/s" if first.matmul_gflops else ""
        threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.threads else ""
        parts.append(f"#### {op}\n")
        parts.append(
            f"{first.date}, torch {first.torch}, triton {first.triton}, ran the {first.backend}{threads}; "
            f"copy {first.copy_gbs:.3g} GB/s{rate}; load before: {first.load}"
            f"{'; ' + first.note if first.note else ''}.\n"
        )
        header = ["ratio", "against", "case", "shape", "dtype", "ms", "against ms", "MiB", "against MiB"]
        parts.append(table([*header, "copy", "matmul"], map(_cells, part)) + "\n")
    return parts


def _cells(row: Row) -> list[str]:
    """One row as text; one that failed says so in place of the ratio."""
    ratio = f"**{row.ratio:.3g}** ({row.ratio_q1:.3g} to {row.ratio_q3:.3g})" if row.ratio is not None else ""
    if row.status != OK:
        ratio = row.status
    ms = "" if row.median_ms is None else f"{row.median_ms:.3g} ({row.q1_ms:.3g} to {row.q3_ms:.3g})"
    shares = ["" if not share else f"{share:.0%}" for share in (row.bandwidth_share, row.matmul_share)]
    rest = ["" if x is None else f"{x:.3g}" for x in (row.against_ms, row.memory_mib, row.against_memory_mib)]
    return [ratio, row.against, row.case, row.shape, row.dtype, ms, *rest, *shares]
