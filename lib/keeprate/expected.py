"""Drift: a run's numbers against those stored in data/expected/<notebook>.<tier>.<device>.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keeprate import project

Results = Mapping[str, Any]


def path_of(results: Results) -> Path:
    """The file that holds the expected numbers of this run; one without a tier is held against the default tier."""
    tier = "default" if results["tier"] == "interactive" else results["tier"]
    name = f"{results['notebook']}.{tier}.{results['device']}.json"
    return project.root() / "data" / "expected" / name


def extract(results: Results) -> dict[str, Any]:
    """The part of a run's results worth expecting: what has a tolerance, the verdicts, and their origin.

    Of the `full` tier, which is run once and not by everybody, the claims are kept whole, with date and machine.
    """
    once = ("started", "seconds", "device_name", "claims") if results["tier"] == "full" else ()
    return {
        **{key: results[key] for key in once},
        **{key: results[key] for key in ("notebook", "tier", "device", "parameters", "versions", "code")},
        "metrics": {
            name: {"value": m["value"], "tolerance": m["tolerance"]}
            for name, m in results["metrics"].items()
            if m["tolerance"] is not None
        },
        "figures": {
            name: {"data": f["data"], "tolerance": f["tolerance"]}
            for name, f in results["figures"].items()
            if f["tolerance"] is not None
        },
        "verdicts": {c["id"]: c["verdict"] for c in results["claims"]},
    }


def read(results: Results) -> dict[str, Any] | None:
    """The expected numbers for this run, or None where nothing is stored for its notebook, tier and device."""
    path = path_of(results)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def stored(notebook: str, tier: str = "full", device: str = "cpu") -> dict[str, Any] | None:
    """What `data/expected` holds of a notebook's run, or None.

    Args:
        notebook: its name.
        tier: of the run.
        device: it ran on.
    """
    return read({"notebook": notebook, "tier": tier, "device": device})


def differences(results: Results, expected: Mapping[str, Any]) -> list[str]:
    """What differs by more than the stored tolerance, one line each: name, old, new, tolerance.

    The parameters must be the same, for other parameters mean other numbers.
    """
    new = extract(results)
    if new["parameters"] != expected["parameters"]:
        return [f"parameters: {expected['parameters']} -> {new['parameters']}; nothing else was compared"]
    lines = list(_named(expected["metrics"], new["metrics"], "metric"))
    for name, old in expected["metrics"].items():
        if name in new["metrics"] and not _close(old["value"], new["metrics"][name]["value"], old["tolerance"]):
            value = new["metrics"][name]["value"]
            lines.append(f"metric {name}: {old['value']} -> {value} (tolerance {old['tolerance']})")
    lines += _named(expected["figures"], new["figures"], "figure")
    for name, old in expected["figures"].items():
        if name in new["figures"]:
            lines += _figure(name, old, new["figures"][name]["data"])
    lines += _named(expected["verdicts"], new["verdicts"], "claim")
    for name, old in expected["verdicts"].items():
        if new["verdicts"].get(name, old) != old:
            lines.append(f"claim {name}: {old} -> {new['verdicts'][name]}")
    return lines


def origin(results: Results, expected: Mapping[str, Any]) -> str:
    """What else changed since the expected numbers were stored: package versions and code."""
    old, new = expected["versions"], results["versions"]
    changed = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    if expected["code"] != results["code"]:
        changed.append(f"code {expected['code']} -> {results['code']}")
    return ", ".join(changed) or "nothing: same versions, same code"


def report(results: Results) -> tuple[list[str], str]:
    """Compare a run with what is stored for it.

    Returns:
        The differences, empty if there are none or nothing is stored, and a text that says so.
    """
    expected = read(results)
    if expected is None:
        return [], f"drift: nothing stored for {path_of(results).stem}; `make expected` stores it"
    if results["tier"] == "interactive" and results["parameters"] != expected["parameters"]:
        return [], f"drift: not compared, the parameters are not those of {path_of(results).name}"
    lines = differences(results, expected)
    if not lines:
        count = len(expected["metrics"]) + len(expected["figures"])
        return [], f"drift: none, {count} metrics and figures within tolerance of {path_of(results).name}"
    text = [f"!! DRIFT from {path_of(results).name}", *(f"!!   {line}" for line in lines)]
    return lines, "\n".join([*text, f"!!   changed since: {origin(results, expected)}"])


def update(results: Results) -> str:
    """Store this run's numbers as the expected ones.

    Returns:
        A text that shows old and new.
    """
    path, old = path_of(results), read(results)
    project.write_json(path, extract(results))
    if old is None:
        return f"{path.name}: stored, {len(extract(results)['metrics'])} metrics"
    lines = differences(results, old) or ["within tolerance"]
    return "\n".join([f"{path.name}: replaced", *(f"  {line}" for line in lines), f"  {origin(results, old)}"])


def _named(old: Mapping[str, Any], new: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Lines for names that only one side has."""
    yield from (f"{kind} {name}: gone" for name in old if name not in new)
    yield from (f"{kind} {name}: new, nothing stored" for name in new if name not in old)


def _close(old: Any, new: Any, tolerance: float) -> bool:
    """Numbers within the tolerance; anything else equal."""
    if isinstance(old, float | int) and isinstance(new, float | int):
        return abs(old - new) <= tolerance
    return old == new


def _figure(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the largest change of each column of the data behind a figure."""
    before, after = old["data"], new
    if before["columns"] != after["columns"] or len(before["data"]) != len(after["data"]):
        shapes = [f"{len(d['data'])} rows of {d['columns']}" for d in (before, after)]
        yield f"figure {name}: {shapes[0]} -> {shapes[1]}"
        return
    for index, column in enumerate(before["columns"]):
        tolerance = old["tolerance"]
        if isinstance(tolerance, dict):
            if column not in tolerance:
                continue
            tolerance = tolerance[column]
        pairs = [(a[index], b[index]) for a, b in zip(before["data"], after["data"], strict=True)]
        far = [pair for pair in pairs if not _close(*pair, tolerance)]
        if far:
            text = f"{len(far)} of {len(pairs)} rows beyond tolerance {tolerance}"
            yield f"figure {name}, column {column}: {text}, first {far[0][0]} -> {far[0][1]}"
