"""Tables of measurements: means over samples with intervals, times in turns as ratios."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from keeprate.measure.interval import bootstrap, wilson


def summarise(samples: pd.DataFrame, by: Sequence[str] = ("method",), confidence: float = 0.95) -> pd.DataFrame:
    """Means over samples with intervals: Wilson's for what is right or wrong, bootstrap for the rest.

    Args:
        samples: Of `study` or `perplexity`, or several of them one below the other.
        by: Columns whose combinations get a row each, in order of appearance.
        confidence: Coverage.

    Returns:
        One row per combination: n, and for every measured column its mean, <column>_low and <column>_high; `correct`
        is called accuracy. Text gets perplexity = exp(nll), with its interval, too. NaN are left out of the means.

    Raises:
        ValueError: If a column is missing.
    """
    missing = [name for name in by if name not in samples]
    if missing or not len(samples):
        raise ValueError(f"no column {missing or 'has a row'}; the table has {', '.join(map(str, samples))}")
    told = {*by, "method", "sample", "question", "kind"}
    measured = [name for name in samples if name not in told and pd.api.types.is_numeric_dtype(samples[name])]
    found = []
    for key, part in samples.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, key, strict=True)) | {"n": len(part)}
        for name in measured:
            values = part[name].dropna().to_numpy()
            if values.dtype == bool:
                number, label = wilson(values, confidence), "accuracy" if name == "correct" else name
            elif len(values):
                number, label = bootstrap(values, confidence=confidence), name
            else:
                continue
            row |= {label: number.value, f"{label}_low": number.low, f"{label}_high": number.high}
        found.append(row)
    table = pd.DataFrame(found)
    if "nll" in table and "last_bytes" in table:
        for end in ("", "_low", "_high"):
            table[f"perplexity{end}"] = np.exp(table[f"nll{end}"])
    return table


def ratios(
    names: list[str],
    full: np.ndarray,
    own: np.ndarray,
    label: str,
    ratio: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> pd.DataFrame:
    low, middle, high = np.quantile(ratio(full[:, None], own), [0.25, 0.5, 0.75], axis=0)
    table = {"method": names, "full_ms": np.median(full), "ms": np.median(own, 0)}
    return pd.DataFrame(table | {label: middle, "low": low, "high": high, "rounds": len(full)})
