"""Patterns of what methods keep: do two methods, models or layers choose the same tokens?

Source: "Which Tokens to Use?", Haurum et al. 2023 (2308.04657), section 5.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

from keeprate.check import choice
from keeprate.trace import Trace


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"both must be [batch, tokens] of one shape; got {tuple(a.shape)} and {tuple(b.shape)}")


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of two kept sets.

    Args:
        a, b: [b, n] boolean.

    Returns:
        [b] in 0..1; NaN where both sets are empty.

    Example:
        >>> iou(torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]]))
        tensor([0.3333])
    """
    _same_shape(a, b)
    return (a & b).sum(1) / (a | b).sum(1)


def ioa(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over area: the share of the kept set a that b keeps as well. Not symmetric.

    Args:
        a, b: [b, n] boolean.

    Returns:
        [b] in 0..1; NaN where a is empty.
    """
    _same_shape(a, b)
    return (a & b).sum(1) / a.sum(1)


def _entropies(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H(a), H(b) and mutual information I(a; b) in nats, [b] each; tokens with label -1 in either are left out."""
    _same_shape(a, b)
    both = (a >= 0) & (b >= 0)
    one, other = (
        torch.nn.functional.one_hot(x.clamp_min(0), max(1, int(x.max()) + 1)).double() * both[..., None] for x in (a, b)
    )
    joint = one.transpose(1, 2) @ other  # b labels_a labels_b
    joint = joint / both.sum(1).clamp_min(1)[:, None, None]

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(p, p).flatten(1).sum(1)

    h_a, h_b = entropy(joint.sum(2)), entropy(joint.sum(1))
    return h_a, h_b, (h_a + h_b - entropy(joint)).clamp_min(0)


def nmi(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Normalised mutual information 2 I(a; b) / (H(a) + H(b)) of two clusterings; names of clusters do not matter.

    Args:
        a, b: [b, n] labels, such as `trace.assignments`; tokens with -1 in either are left out.

    Returns:
        [b] in 0..1, 1 = the same partition (as sklearn: also when both have one cluster only).

    Example:
        >>> nmi(torch.tensor([[0, 0, 1]]), torch.tensor([[1, 1, 0]]))
        tensor([1.])
    """
    h_a, h_b, mutual = _entropies(a, b)
    total = h_a + h_b
    return torch.where(total > 1e-12, 2 * mutual / total.clamp_min(1e-12), 1.0).float()


def homogeneity(truth: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """I(truth; labels) / H(truth): 1 when every cluster holds tokens of one true class only.

    Args:
        truth: [b, n] true classes, -1 = left out; a boolean truth is two classes.
        labels: [b, n] clusters, -1 = left out.

    Returns:
        [b] in 0..1; 1 where there is only one true class.
    """
    h, _, mutual = _entropies(truth.long(), labels)
    return torch.where(h > 1e-12, mutual / h.clamp_min(1e-12), 1.0).float()


def heatmap(trace: Trace) -> torch.Tensor:
    """Average depth that each position survives: the share of blocks after which a patch still stands for itself.

    Args:
        trace: Of a run over many samples.

    Returns:
        [rows, cols] in 0..1.

    Raises:
        ValueError: If nothing was run.
    """
    if not trace.runs:
        raise ValueError("the trace is empty: run the model inside the method's with block first")
    ends = [*trace.layers[1:], trace.depth + 1]
    lives = torch.ones(trace.grid[0] * trace.grid[1]) * ((trace.layers or [trace.depth + 1])[0] - 1)
    for i, (begin, end) in enumerate(zip(trace.layers, ends, strict=False)):
        lives += trace.mask(i).float().mean(0).cpu() * (end - begin)
    return (lives / trace.depth).view(trace.grid)


def compare_heatmaps(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """How alike two heatmaps are.

    Args:
        a, b: Non-negative, of one shape; for the divergences both are scaled to sum 1.

    Returns:
        pearson and spearman correlation (NaN for a constant map), kl = KL(a || b) and js, both in nats.

    Raises:
        ValueError: If the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"heatmaps must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    x, y = (np.asarray(m, dtype=float).ravel() for m in (a, b))
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    p, q = (m / m.sum() for m in (x, y))
    with np.errstate(divide="ignore"):
        kl = float(stats.entropy(p, q))
    return {
        "pearson": float(stats.pearsonr(x, y).statistic) if varied else float("nan"),
        "spearman": float(stats.spearmanr(x, y).statistic) if varied else float("nan"),
        "kl": kl,
        "js": float(jensenshannon(p, q) ** 2),
    }


def agreement(traces: Mapping[str, Trace], step: int = -1, measure: str = "iou") -> pd.DataFrame:
    """How far methods agree on the same images, pair by pair.

    Args:
        traces: Runs over the same samples in the same order, by method.
        step: Which reduction, counted from 0; -1 = the last.
        measure: "iou" of the kept sets, or "nmi" of the assignments (for methods that merge).

    Returns:
        Symmetric DataFrame, method by method: mean over samples.

    Raises:
        ValueError: On an unknown measure, or traces of different samples.
    """
    choice("measure", measure, ("iou", "nmi"))
    what = {name: trace.mask(step) if measure == "iou" else trace.assignments[step] for name, trace in traces.items()}
    compare = iou if measure == "iou" else nmi
    table = pd.DataFrame(index=list(what), columns=list(what), dtype=float)
    for i, a in enumerate(what):
        for b in list(what)[i:]:
            table.loc[a, b] = table.loc[b, a] = float(compare(what[a], what[b]).nanmean())
    return table


def iou_between_layers(trace: Trace) -> pd.DataFrame:
    """Mean IoU of the sets kept after any two reductions of one run.

    Args:
        trace: Of the run.

    Returns:
        Symmetric DataFrame; index and columns are the 1-based blocks of the reductions.
    """
    masks = [trace.mask(i) for i in range(len(trace.layers))]
    values = [[float(iou(a, b).nanmean()) for b in masks] for a in masks]
    return pd.DataFrame(values, index=trace.layers, columns=trace.layers)


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of features.

    Args:
        x: [samples, d1].
        y: [samples, d2], the same samples.

    Returns:
        0..1; 1 when one is a rotation and scaling of the other.

    Raises:
        ValueError: If the numbers of samples differ or are below 2.

    Source: Kornblith et al. 2019, eq. 4 for a linear kernel.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x and y must be [samples, dim] of the same samples; got {tuple(x.shape)}, {tuple(y.shape)}")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
