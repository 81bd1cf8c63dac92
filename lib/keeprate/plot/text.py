"""Text coloured by what was kept of it: as a figure, as HTML, and as one strip of colour per method."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keeprate.check import whole
from keeprate.plot.look import RC, SIZE, axes

KEPT, ANSWER = "#0173b2", "#d55e00"  # shade of what was kept; outline of what holds the answer
ADVANCE = 0.602  # width of a character of DejaVu Sans Mono, which matplotlib brings, in font sizes
LINE = 1.55  # height of a line in font sizes
VISIBLE = str.maketrans({"\n": "↵", "\t": "→", "\r": " "})


def pieces(tokenizer: Any, ids: torch.Tensor | Sequence[int]) -> list[str]:
    """The text of every token, spaces included.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: [n] token ids.
    """
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    return tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def _numbers(words: Sequence[str], shares: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Shares in 0..1 and marks, one per token."""
    shares, marks = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (shares, truth))
    marks = np.zeros(len(words), dtype=bool) if truth is None else marks.astype(bool)
    if len(words) == 0 or shares.shape != (len(words),) or marks.shape != (len(words),):
        raise ValueError(
            f"one share and one mark per token, of at least one token; got {len(words)} tokens, shares "
            f"{shares.shape}, marks {marks.shape}"
        )
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"shares must lie in [0, 1]; got {shares.min():g} to {shares.max():g}")
    return shares.astype(float), marks


def _lines(words: Sequence[str], width: int) -> list[tuple[int, int, int, str]]:
    """Tokens on a grid of characters, cut where a line ends: (token, line, column, characters)."""
    place, found = 0, []
    for token, word in enumerate(words):
        word = word.translate(VISIBLE)
        while word:
            line, column = divmod(place, width)
            head, word = word[: width - column], word[width - column :]
            found.append((token, line, column, head))
            place += len(head)
    return found


def token_text(
    words: Sequence[str],
    shares: Any,
    truth: Any = None,
    title: str = "",
    width: int = 110,
    size: float = 6.5,
    ax: Axes | None = None,
) -> Axes:
    """Text whose tokens are shaded by how many heads and layers kept them; what holds the answer is outlined.

    Args:
        words: [n] text of every token (`pieces`).
        shares: [n] in 0..1, such as `measure.kv.votes`: 0 = white, 1 = full colour.
        truth: [n] boolean, tokens to outline.
        title: Above the text.
        width: Characters a line.
        size: Of the font, in points.
        ax: Where to draw; a new figure that fits the text when None.

    Raises:
        ValueError: If the numbers do not fit the tokens or leave 0..1.

    Example:
        >>> token_text(pieces(tokenizer, ids), votes, truth)   # doctest: +SKIP
    """
    shares, marks = _numbers(words, shares, truth)
    cells = _lines(words, whole("width", width))
    lines = cells[-1][1] + 1
    if ax is None:
        inches = width * ADVANCE * size / 72, lines * LINE * size / 72
        with plt.rc_context(RC):
            figure = plt.figure(figsize=(inches[0], inches[1] + (0.25 if title else 0.02)))
            ax = figure.add_axes((0, 0, 1, inches[1] / figure.get_figheight()))
    for outlined in (False, True):
        chosen = [cell for cell in cells if marks[cell[0]] == outlined]
        boxes = [Rectangle((column, line), len(part), 1) for _, line, column, part in chosen]
        colours = [(*_rgb(KEPT), 0.75 * shares[token]) for token, *_ in chosen]
        edge = {"edgecolor": ANSWER, "linewidth": 1.0} if outlined else {"edgecolor": "none"}
        ax.add_collection(PatchCollection(boxes, facecolor=colours, zorder=1 + outlined, **edge))
    for token, line, column, part in cells:
        if part.strip():
            ink = ANSWER if marks[token] and shares[token] < 0.5 else "black" if shares[token] else "#7a7a7a"
            ax.text(column, line + 0.74, part, family="DejaVu Sans Mono", fontsize=size, color=ink, zorder=3)
    ax.set(xlim=(0, width), ylim=(lines, 0))
    ax.set_axis_off()
    ax.set_title(title, fontsize=8, loc="left")
    return ax


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def token_html(words: Sequence[str], shares: Any, truth: Any = None, title: str = "") -> str:
    """The same as HTML; a token tells its number and its share when the mouse rests on it.

    Args:
        words, shares, truth, title: As in `token_text`.

    Returns:
        A <div>; show it with `IPython.display.HTML`.

    Raises:
        ValueError: As in `token_text`.
    """
    shares, marks = _numbers(words, shares, truth)
    red, green, blue = (round(255 * x) for x in _rgb(KEPT))
    spans = []
    for i, (word, share, mark) in enumerate(zip(words, shares, marks, strict=True)):
        style = f"background:rgba({red},{green},{blue},{0.75 * share:.2f})"
        style += f";outline:2px solid {ANSWER}" if mark else ""
        shown = html.escape(word).replace("\n", "↵<br>")
        spans.append(f'<span title="token {i}: kept by {share:.0%}" style="{style}">{shown}</span>')
    head = f"<b>{html.escape(title)}</b><br>" if title else ""
    box = "font-family:monospace;font-size:12px;line-height:1.5;white-space:pre-wrap;color:#000;background:#fff"
    return f'<div style="{box}">{head}{"".join(spans)}</div>'


def token_strips(shares: Mapping[str, Any], truth: Any = None, title: str = "", ax: Axes | None = None) -> Axes:
    """One row per method: how many heads and layers kept each token, along the whole prompt.

    Args:
        shares: Method -> [n] in 0..1.
        truth: [n] boolean, tokens whose place is marked above the rows.
        title: Of the figure.
        ax: Where to draw; a new figure when None.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to show, or the numbers do not fit each other.
    """
    if not shares:
        raise ValueError("nothing to show: shares hold no method")
    n = len(next(iter(shares.values())))
    rows = np.stack([_numbers([""] * n, share, truth)[0] for share in shares.values()])
    ax = axes(ax, (SIZE[0] * 1.5, 0.8 + 0.2 * len(rows)))
    colours = sns.light_palette(KEPT, as_cmap=True)
    image = ax.imshow(rows, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    if truth is not None:
        at = np.flatnonzero(np.asarray(truth.cpu() if isinstance(truth, torch.Tensor) else truth))
        ax.plot(at, np.full(len(at), -0.75), "v", color=ANSWER, markersize=4, clip_on=False)
    ax.set_yticks(range(len(rows)), list(shares), fontsize=7)
    ax.set(xlabel="token of the prompt", title=title)
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.03, pad=0.01)
    bar.set_label("share of heads", fontsize=7)
    return ax


def token_texts(words: Sequence[str], shares: Mapping[str, Any], truth: Any = None, **options: Any) -> Figure:
    """Several methods on one text, one below the other.

    Args:
        words, truth: As in `token_text`.
        shares: Title -> [n].
        **options: Of `token_text`: width, size.

    Raises:
        ValueError: If there is nothing to show, or as `token_text` does.
    """
    if not shares:
        raise ValueError("nothing to show: shares hold no method")
    width, size = options.get("width", 110), options.get("size", 6.5)
    lines = _lines(words, whole("width", width))[-1][1] + 1
    each = lines * LINE * size / 72 + 0.3
    with plt.rc_context(RC):
        figure = plt.figure(figsize=(width * ADVANCE * size / 72, each * len(shares)))
    for i, (name, share) in enumerate(shares.items()):
        height = (each - 0.3) / each / len(shares)
        ax = figure.add_axes((0, 1 - (i + 1) / len(shares), 1, height))
        token_text(words, share, truth, name, width, size, ax)
    return figure
