"""Images with what became of their patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from keeprate.plot.look import RC, axes
from keeprate.trace import Trace


def pictures(processor: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the model saw, as images: the processor's normalisation undone.

    Args:
        processor: An image processor with image_mean and image_std.
        pixel_values: [b, 3, h, w].

    Returns:
        [b, h, w, 3] in 0..1.
    """
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    return (pixel_values.detach().float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def _picture(image: Any) -> np.ndarray:
    """Any image as floats [h, w, 3] in 0..1."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be [h, w, 3] or [3, h, w]; got {image.shape}")
    return image / 255.0 if image.dtype == np.uint8 else image.astype(float)


def _cells(image: np.ndarray, grid: tuple[int, int], n: int) -> np.ndarray:
    """[h, w] index of the patch that every pixel lies in."""
    (h, w), (rows, cols) = image.shape[:2], grid
    if rows * cols != n:
        raise ValueError(f"a grid of {rows} x {cols} has {rows * cols} patches; got {n}")
    return (np.arange(h) * rows // h)[:, None] * cols + (np.arange(w) * cols // w)[None, :]


def overlay(
    image: Any, kept: torch.Tensor | np.ndarray, grid: tuple[int, int], title: str = "", ax: Axes | None = None
) -> Axes:
    """Show on an image what became of its patches: dropped ones fade, merged ones take their cluster's mean colour.

    Args:
        image: PIL image, or array [h, w, 3] or [3, h, w], uint8 or in 0..1, as the model saw it.
        kept: [n] boolean, True = kept; or [n] cluster of every patch, -1 = dropped. Clusters are outlined.
        grid: Rows and columns of patches.
        title: Above the image.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: If the number of patches does not fit the grid.

    Example:
        >>> overlay(image, trace.mask()[0], trace.grid)   # doctest: +SKIP
    """
    kept = np.asarray(kept.cpu() if isinstance(kept, torch.Tensor) else kept)
    labels = np.where(kept, np.arange(len(kept)), -1) if kept.dtype == bool else kept
    image, ax = _picture(image), axes(ax, (2.2, 2.2))
    cell = _cells(image, grid, len(labels))
    of = labels[cell]  # cluster of every pixel
    shown = image.copy()
    members = np.bincount(labels[labels >= 0], minlength=1)
    together = (of >= 0) & (members[of.clip(0)] > 1)
    pixels = np.bincount(of[of >= 0], minlength=len(members)).clip(1)
    for channel in range(3):
        mean = np.bincount(of[of >= 0], image[..., channel][of >= 0], minlength=len(members)) / pixels
        shown[..., channel] = np.where(together, mean[of.clip(0)], image[..., channel])
    shown = np.where((of < 0)[..., None], 0.15 * image.mean(-1, keepdims=True) + 0.85, shown)
    ax.imshow(shown, interpolation="nearest")
    ax.add_collection(
        LineCollection(_borders(labels.reshape(grid), members, image.shape[:2]), colors="black", linewidths=0.6)
    )
    return bare(ax, title)


def _borders(
    labels: np.ndarray, members: np.ndarray, size: tuple[int, int]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Segments, in pixels, between neighbouring patches of different clusters, unless both patches are unchanged."""
    y, x = (np.ceil(np.arange(k + 1) * s / k) - 0.5 for k, s in zip(labels.shape, size, strict=True))
    alone = (labels >= 0) & (members[labels.clip(0)] == 1)
    below = (labels[1:] != labels[:-1]) & ~(alone[1:] & alone[:-1])
    beside = (labels[:, 1:] != labels[:, :-1]) & ~(alone[:, 1:] & alone[:, :-1])
    across = [((x[c], y[r + 1]), (x[c + 1], y[r + 1])) for r, c in np.argwhere(below)]
    return across + [((x[c + 1], y[r]), (x[c + 1], y[r + 1])) for r, c in np.argwhere(beside)]


def bare(ax: Axes, title: str) -> Axes:
    """Axes of an image: no ticks, no frame, a small title."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=8)
    return ax


def heat(scores: torch.Tensor, image: Any, grid: tuple[int, int], title: str = "", ax: Axes | None = None) -> Axes:
    """Scores of the patches over a grey image: bright = matters, patches that are absent (NaN) stay grey.

    Args:
        scores: [n]; scaled to their own range.
        image: As in `overlay`.
        grid: Rows and columns of patches.
        title: Above the image.
        ax: Where to draw; a new figure when None.
    """
    scores = np.asarray(scores.cpu(), dtype=float)
    image, ax = _picture(image), axes(ax, (2.2, 2.2))
    ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    over = np.ma.masked_invalid(scores[_cells(image, grid, len(scores))])
    ax.imshow(over, cmap="inferno", alpha=0.6, interpolation="nearest")
    return bare(ax, title)


def clusters(trace: Trace, step: int = -1) -> torch.Tensor:
    """What `overlay` draws: [b, n] token of every patch, -1 where it was dropped or went into a summary token."""
    kept, assignment = trace.kept[step], trace.assignments[step]
    return torch.where(kept.gather(1, assignment.clamp_min(0)) < 0, -1, assignment)


def overlays(images: Sequence[Any], traces: Trace | Mapping[str, Trace], step: int = -1, truth: Any = None) -> Figure:
    """What was kept of several images: a row per method, or per reduction of one run.

    Args:
        images: Images of the first samples of the run, one column each.
        traces: Runs over these samples by method; or one run, whose reductions become the rows.
        step: Which reduction to show of each method, counted from 0; -1 = the last.
        truth: [samples, n] boolean, the patches that matter: one more row on top.

    Returns:
        The figure.

    Raises:
        ValueError: If there is nothing to show.
    """
    if isinstance(traces, Trace):
        rows = {f"block {layer}": (traces, i) for i, layer in enumerate(traces.layers)}
    else:
        rows = {name: (trace, step) for name, trace in traces.items()}
    if not rows or not len(images):
        raise ValueError(f"nothing to show: {len(rows)} rows of {len(images)} images")
    grid = next(iter(rows.values()))[0].grid
    panels: dict[str, Any] = {"image": np.ones((len(images), grid[0] * grid[1]), dtype=int) * -2}
    if truth is not None:
        panels["truth"] = truth
    panels |= {name: clusters(*which) for name, which in rows.items()}
    with plt.rc_context(RC):
        figure, panes = plt.subplots(
            len(panels),
            len(images),
            figsize=(1.15 * len(images) + 0.6, 1.15 * len(panels)),
            squeeze=False,
            layout="constrained",
        )
    for (name, what), line in zip(panels.items(), panes, strict=True):
        for i, (image, ax) in enumerate(zip(images, line, strict=True)):
            if name == "image":
                bare(ax, "").imshow(_picture(image), interpolation="nearest")
            else:
                overlay(image, what[i], grid, ax=ax)
        text = name
        if name in rows:
            trace, which = rows[name]
            text += f"\n{int((trace.sizes[which] > 0).sum(1).median())} tokens"
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    return figure
