"""Curves, bars, named dots and matrices of numbers."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

from keeprate.plot.look import BANDS, SIZE, axes, colour, dashes, marker


def _require(df: pd.DataFrame, *columns: str | None) -> None:
    missing = [c for c in columns if c is not None and c not in df]
    if missing:
        raise ValueError(f"the table has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, df))}")


def curve(
    df: pd.DataFrame,
    x: str,
    y: str,
    hue: str = "method",
    low: str | None = None,
    high: str | None = None,
    dense: float | None = None,
    paper: float | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """One line per method with its interval as a band and its name at the right end.

    Args:
        df: Tidy table.
        x, y, hue: Its columns; name units in `xlabel` and `ylabel`.
        low, high: Columns with the ends of the interval of y.
        dense: Value of the dense model: a dashed line.
        paper: The paper's value: a dotted grey line.
        xlabel, ylabel: Default to the columns' names.
        title: Of the figure.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: If a column is missing.

    Example:
        >>> curve(df, "gflops", "accuracy", low="low", high="high", dense=0.97)   # doctest: +SKIP
    """
    _require(df, x, y, hue, low, high)
    ax = axes(ax)
    groups, ends = list(df.groupby(hue, sort=False)), []
    for name, part in groups:
        part = part.sort_values(x)
        look = {"color": colour(str(name)), "linestyle": dashes(str(name))}
        ax.plot(part[x], part[y], marker=marker(str(name)), markersize=4, linewidth=1.5, label=str(name), **look)
        if low and high and len(groups) <= BANDS:
            ax.fill_between(part[x], part[low], part[high], color=look["color"], alpha=0.12, linewidth=0)
        elif low and high:
            ax.vlines(part[x], part[low], part[high], color=look["color"], alpha=0.5, linewidth=0.8)
        ends.append((str(name), part[x].iloc[-1], part[y].iloc[-1], look))
    for value, text, look in (
        (dense, "dense", {"color": "black", "linestyle": "--"}),
        (paper, "paper", {"color": "#6a6a6a", "linestyle": ":"}),
    ):
        if value is not None:
            ax.axhline(value, linewidth=1, zorder=1, **look)
            ends.append((text, None, value, look))
    ax.set(xlabel=xlabel or x, ylabel=ylabel or y, title=title)
    _label_ends(ax, ends)
    return ax


def _label_ends(ax: Axes, ends: list[tuple[str, float | None, float, dict[str, Any]]], points: float = 7.5) -> None:
    """Names right of the axes, each as near to its line's end as the others allow."""
    ends = sorted(ends, key=lambda end: end[2])
    low, high = ax.get_ylim()
    height = ax.get_position().height * ax.figure.get_size_inches()[1] * 72
    gap = (high - low) * (points + 1) / height
    steps = gap * np.arange(len(ends))
    # least squares under "at least one gap apart", then inside the axes
    wish = isotonic_regression(np.array([end[2] for end in ends]) - steps).x
    places = np.clip(wish, low, max(low, high - (steps[-1] if len(ends) else 0))) + steps
    right = ax.get_xlim()[1]
    for (name, x, y, look), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2, **look}
        ax.annotate(
            name,
            (right if x is None else x, y),
            xytext=(1.05, place),
            textcoords=ax.get_yaxis_transform(),
            fontsize=points,
            color=look["color"],
            va="center",
            annotation_clip=False,
            arrowprops=line,
        )


def bars(
    df: pd.DataFrame,
    value: str,
    name: str = "method",
    low: str | None = None,
    high: str | None = None,
    reference: float | None = None,
    xlabel: str | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """One horizontal bar per method, longest on top, with its interval and its number.

    Args:
        df: One row per method.
        value, name: Its columns.
        low, high: Columns with the ends of the interval.
        reference: A dashed line, such as chance or 1.0 for "as fast as dense".
        xlabel: With units; the column's name by default.
        title: Of the figure.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: If a column is missing.
    """
    _require(df, value, name, low, high)
    df = df.sort_values(value)
    ax = axes(ax, (SIZE[0], max(1.5, 0.7 + 0.22 * len(df))))
    ax.barh(df[name].astype(str), df[value], color=[colour(str(n)) for n in df[name]], height=0.65)
    tips = df[value]
    if low and high:
        error = np.stack([df[value] - df[low], df[high] - df[value]]).clip(0)
        known = error.sum(0) > 0  # an interval without width is none: a cap would look very sure
        place, error = np.arange(len(df))[known], error[:, known]
        ax.errorbar(df[value][known], place, xerr=error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        tips = df[low].where(df[value] < 0, df[high])
    for i, (tip, number) in enumerate(zip(tips, df[value], strict=True)):
        outward = {"xytext": (-3, 0), "ha": "right"} if number < 0 else {"xytext": (3, 0)}
        ax.annotate(f"{number:.3g}", (tip, i), textcoords="offset points", va="center", fontsize=7, **outward)
    if reference is not None:
        ax.axvline(reference, color="black", linestyle="--", linewidth=1)
    ax.grid(False, axis="y")
    ax.margins(x=0.1, y=0.02)
    ax.set(xlabel=xlabel or value, ylabel="", title=title)
    return ax


def scatter(
    df: pd.DataFrame,
    x: str,
    y: str,
    name: str = "method",
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """One dot with its name per method; a name moves up where it would cover another one.

    Args:
        df: One row per method; rows without a number are left out.
        x, y, name: Its columns.
        xlabel, ylabel: With units; the columns' names by default.
        title: Of the figure.
        ax: Where to draw, with its scale (such as a logarithmic one) set before; a new figure when None.

    Raises:
        ValueError: If a column is missing.

    Example:
        >>> scatter(pd.DataFrame({"method": ["A", "B"], "ms": [3, 5], "accuracy": [0.7, 0.9]}), "ms", "accuracy")
    """
    _require(df, x, y, name)
    df = df.dropna(subset=[x, y])
    ax = axes(ax, (7.0, 4.2))
    ax.set(xlabel=xlabel or x, ylabel=ylabel or y, title=title)
    ax.scatter(df[x], df[y], color=[colour(str(each)) for each in df[name]], s=18, zorder=3)
    ax.figure.canvas.draw()  # settles the layout, which decides what overlaps
    point, right = ax.figure.dpi / 72, ax.transAxes.transform((1, 0))[0]
    dots = ax.transData.transform(df[[x, y]].to_numpy(dtype=float))
    taken = [Bbox.from_bounds(*(dot - 2 * point), 4 * point, 4 * point) for dot in dots]
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "shrinkA": 0, "shrinkB": 2}
    for i in dots[:, 1].argsort():
        row, dot = df.iloc[i], dots[i]
        look = {"textcoords": "offset points", "size": 6, "va": "bottom", "arrowprops": line}
        text = ax.annotate(str(row[name]), (row[x], row[y]), xytext=(0, 0), **look)
        size = Text.get_window_extent(text)  # of the letters, without the line
        side = 3 * point if dot[0] + 3 * point + size.width < right else -3 * point - size.width
        box = Bbox.from_bounds(dot[0] + side, dot[1] + point, size.width, size.height)
        while any(box.overlaps(other) for other in taken):
            box = box.translated(0, point)
        taken.append(box.padded(0.5 * point))
        text.xyann = ((box.x0 - dot[0]) / point, (box.y0 - dot[1]) / point)
    return ax


def matrix(df: pd.DataFrame, label: str = "mean IoU of kept patches", title: str = "", ax: Axes | None = None) -> Axes:
    """A square table of agreement (`patterns.agreement`) as an annotated heatmap, scaled 0 to 1.

    Args:
        df: Methods by methods.
        label: What the numbers are.
        title: Of the figure.
        ax: Where to draw; a new figure when None.
    """
    side = 1.6 + 0.38 * len(df)
    ax = axes(ax, (side + 0.6, side))
    options = {"vmin": 0, "vmax": 1, "cmap": "cividis", "square": True, "annot_kws": {"size": 7}}
    sns.heatmap(df, annot=True, fmt=".2f", ax=ax, cbar_kws={"label": label, "shrink": 0.8}, **options)
    ax.tick_params(length=0)
    ax.set(title=title, xlabel="", ylabel="")
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    plt.setp(ax.get_yticklabels(), rotation=0)
    return ax
