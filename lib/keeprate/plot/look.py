"""The look: colours, markers and line styles of the methods, sizes and fonts."""

import zlib
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes

SIZE = (5.0, 3.0)  # inches
GREY = "#949494"
BANDS = 6  # more lines than this show their intervals as bars, since bands would blur
# seaborn's "colorblind" without its grey (kept for baselines), light pink and yellow (too pale on white)
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
BASELINES = {
    "Random": ("x", (0, (4, 1.5))),
    "Radial": ("+", (0, (1, 1))),
    "RandomKV": ("x", (0, (4, 1.5))),
    "OracleKV": ("*", (0, (1, 1))),
    "RandomRead": ("1", (0, (4, 1.5, 1, 1.5))),
    "TopKRead": ("2", (0, (1, 2.5))),
    "RandomVisual": ("x", (0, (4, 1.5))),
    "RandomInside": ("1", (0, (4, 1.5, 1, 1.5))),
    "UniformGrid": ("+", (0, (1, 1))),
    "Pooling": ("2", (0, (1, 2.5))),
    "OracleVisual": ("*", (0, (2, 2))),
    "SFT": ("", "--"),
    "RandomMask": ("x", (0, (4, 1.5))),
    "Oracle": ("*", (0, (1, 1))),
    "dense": ("", "--"),
}
# fixed places in COLOURS within each family, seven at a time; the first seven are solid, the next dashed
ORDER = {
    "vit": (
        *("TopK", "EViT", "ToMe", "ATC", "PiToMe", "ZeroTPrune", "DPCKNN"),
        *("ATS", "BAT", "MSTM", "TokenPooling", "KMedoids"),
    ),
    "kv": (
        *("SnapKV", "H2O", "ExpectedAttention", "KeyDiff", "AdaKV", "StreamingLLM", "KVCompose"),
        *("PyramidKV", "VATP", "CAOTE", "KNorm", "TOVA", "RCStat", "SepLLM"),
        *("Quest", "Scissorhands", "TidalDecode", "A2SF", "TokenSelect", "ZipCache", "FASA"),
        *("ActQKV", "PoD"),
    ),
    "mllm": (
        *("FasterVLM", "DivPrune", "VisionZip", "FastV", "PyramidDrop", "SparseVLM", "DART"),
        *("MMTok", "TRIM", "ZOOPrune", "VScan", "FlowCut", "TransPrune", "BTP"),
        *("PruMerge", "VTCCLS", "FoPru", "ToDRE", "GreedyPrune", "GPrune", "TSC"),
        *("RecoverableCompression", "Script", "STAR", "FiCoCo", "Simignore", "CoreMatching", "MustDrop"),
        *("GAP", "AttentionDebiasing", "TrimmedLlama"),
    ),
    "sft": (
        *("Rho1", "TokenCleaning", "SsToken", "ProFit", "DFT", "EntropyWeight", "Focal"),
        *("RFT", "PDL", "NTL", "TLTraining", "TokenFilter", "CT", "PRIOR"),
    ),
}
RC = {
    "figure.figsize": SIZE,
    "figure.dpi": 110,
    "savefig.format": "svg",
    "savefig.bbox": "tight",
    "svg.hashsalt": "keeprate",  # the same figure gives the same file
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e6e6",
}


def style() -> None:
    """Use the project's style for every figure from here on, as SVG in notebooks.

    Example:
        >>> style()   # doctest: +SKIP
    """
    sns.set_theme(context="paper", style="whitegrid", rc=RC)
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg")


def place(name: str) -> int:
    """Number of a method in its family's ORDER; one that is in none gets a place by its name."""
    name = name.split("(")[0]
    known = next((names for names in ORDER.values() if name in names), ())
    return known.index(name) if known else zlib.crc32(name.encode()) % (len(COLOURS) * len(DASHES))


def colour(name: str) -> str:
    """The colour of a method, the same in every figure; grey for baselines. Anything from "(" on is ignored."""
    return GREY if name.split("(")[0] in BASELINES else COLOURS[place(name) % len(COLOURS)]


def marker(name: str) -> str:
    """The marker of a method; with the line style it tells methods of one colour apart."""
    short = name.split("(")[0]
    return BASELINES[short][0] if short in BASELINES else MARKERS[(place(name) * 8 // 7) % len(MARKERS)]


def dashes(name: str) -> Any:
    """The line style of a method, as matplotlib takes it."""
    short = name.split("(")[0]
    return BASELINES[short][1] if short in BASELINES else DASHES[place(name) // len(COLOURS) % len(DASHES)]


def axes(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """The given axes, or those of a new figure in the project's style."""
    if ax is not None:
        return ax
    with sns.axes_style("whitegrid", RC), plt.rc_context(RC):
        return plt.subplots(figsize=size, layout="constrained")[1]
