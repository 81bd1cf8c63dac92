"""The acceptance bars: what every kernel has to reach, held against the rows that were measured."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from keeprate_kernels.bench.record import OK, Row

# the names of cases and baselines that bars and races share
ALL, KNOWN, WINDOW = "all rows", "all rows, log-sum-exp known", "window of 64 rows"
SDPA, LOOP, LOSS = "SDPA forward", "torch loop", "logits, then loss"
ALL_STATISTICS, FULL = "all statistics", "full decode"
BUDGET = 1024  # tokens of a selected-attention step whose time must not follow n

Measured = tuple[float, str]  # the number held against the limit, and the row it comes from


@dataclass(frozen=True)
class Bar:
    """One acceptance bar.

    Attributes:
        text: What is measured.
        kind: "cuda" or "cpu".
        limit: Largest value that meets the bar.
        measure: Rows of one device -> the number and where it stands; None where rows are missing.
        why: The reason, shown where the bar is missed.
    """

    text: str
    kind: str
    limit: float
    measure: Callable[[list[Row]], Measured | None]
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """A bar on one device: "met", "missed" or "not taken"."""

    bar: str
    limit: float
    device: str
    measured: str
    verdict: str
    why: str


def sizes(row: Row) -> dict[str, int]:
    """The sizes in a row's shape: "b1 h8 n4096" -> {"b": 1, "h": 8, "n": 4096}."""
    return {name: int(size) for name, size in re.findall(r"([a-zA-Z]+)(\d+)", row.shape)}


def _rows(rows: list[Row], op: str, n: int | None, against: str, *words: str) -> list[Row]:
    """Rows that succeeded, of an op at a size, whose case is made of the given words in this order."""
    case = ", ".join(words)
    found = [r for r in rows if r.op == op and r.against == against and r.case == case and r.status == OK]
    return [r for r in found if n is None or r.n == n]


def _worst(value: Callable[[Row], float], *where) -> Callable[[list[Row]], Measured | None]:
    """Largest value over some rows."""

    def measure(rows: list[Row]) -> Measured | None:
        found = [(value(row), row.shape) for row in _rows(rows, *where)]
        return max(found) if found else None

    return measure


def _growth(value: Callable[[Row], float], low: int, high: int, *where) -> Callable[[list[Row]], Measured | None]:
    """Value at the larger size over value at the smaller one; the worst of several batch sizes."""

    def measure(rows: list[Row]) -> Measured | None:
        small, large = ({sizes(r)["b"]: value(r) for r in _rows(rows, where[0], n, *where[1:])} for n in (low, high))
        found = [(large[b] / small[b], f"b{b}: {small[b]:.3g} to {large[b]:.3g}") for b in small if b in large]
        return max(found) if found else None

    return measure


def _ratio(row: Row) -> float:
    return row.ratio


def _matrix(row: Row) -> float:
    """Memory as a share of the fp32 attention matrix of all heads."""
    s = sizes(row)
    return row.memory_mib * 2**20 / (4 * s["b"] * s["h"] * s["n"] ** 2)


def _received(kind: str, case: str, n: int, limit: float) -> list[Bar]:
    """One bar for each kind of mask: attention_received over SDPA."""
    name = f"`attention_received`, {case}, n {n}, {{}}: time over one SDPA forward"
    return [
        Bar(name.format(mask), kind, limit, _worst(_ratio, "attention_received", n, SDPA, case, mask))
        for mask in ("not causal", "causal")
    ]


BARS = [
    *_received("cuda", KNOWN, 16384, 0.65),
    *_received("cuda", WINDOW, 16384, 0.05),
    Bar(
        "`attention_received`, all rows, causal: memory per token at n 65536 over that at n 16384",
        "cuda",
        1.1,
        _growth(lambda r: r.memory_mib / r.n, 16384, 65536, "attention_received", SDPA, KNOWN, "causal"),
    ),
    Bar(
        f"`selected_attention`, budget {BUDGET}: time at n 65536 over that at n 16384",
        "cuda",
        1.25,
        _growth(lambda r: r.median_ms, 16384, 65536, "selected_attention", FULL, f"budget {BUDGET}"),
    ),
    Bar(
        "`farthest_point`, 576 tokens, keep 64, batch 16: time over the torch loop",
        "cuda",
        0.1,
        _worst(_ratio, "farthest_point", 576, LOOP, "keep 64"),
    ),
    Bar(
        "`token_stats`, V 131072: time over the forward pass of the logits path",
        "cuda",
        1.1,
        _worst(_ratio, "token_stats", 131072, LOSS, ALL_STATISTICS),
    ),
    Bar(
        "`token_stats`, V 131072: memory over that of the logits path",
        "cuda",
        0.05,
        _worst(lambda r: r.memory_mib / r.against_memory_mib, "token_stats", 131072, LOSS, ALL_STATISTICS),
    ),
    *_received("cpu", ALL, 4096, 0.9),
    Bar(
        "`attention_received`, all rows, n 4096: memory over the n x n matrix of all heads",
        "cpu",
        0.05,
        lambda rows: max(
            (found for mask in ("not causal", "causal")
             if (found := _worst(_matrix, "attention_received", 4096, SDPA, ALL, mask)(rows))),
            default=None,
        ),
    ),
]  # fmt: skip


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Every bar on every device of its kind that has rows; "not taken" where none has."""
    found = []
    for bar in BARS:
        devices = sorted({row.device for row in rows if row.kind == bar.kind}) or ["none"]
        for device in devices:
            measured = bar.measure([row for row in rows if row.device == device])
            if measured is None:
                found.append(Verdict(bar.text, bar.limit, device, "", "not taken", bar.why))
                continue
            value, where = measured
            verdict = "met" if value <= bar.limit else "missed"
            found.append(Verdict(bar.text, bar.limit, device, f"{value:.3g} ({where})", verdict, bar.why))
    return found
