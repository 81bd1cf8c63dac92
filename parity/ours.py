"""Do our methods keep the positions that kvpress keeps? `make parity` answers, see README.md in this folder.

    python parity/ours.py prepare FOLDER    # checkpoint, prompts and settings for both sides
    python parity/ours.py compare FOLDER    # after theirs.py: the table data/parity/kvpress.csv

Where the answer is no, a `Variant` row says why: our method with only the named difference changed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from keeprate import kv

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "data" / "parity" / "kvpress.csv"
COLUMNS = (
    "method", "press", "ours", "theirs", "variant", "positions", "heads_equal", "heads", "kept_ours", "kept_theirs",
    "why", "kvpress", "torch", "transformers_ours", "transformers_theirs", "date",
)  # fmt: skip
LENGTHS = (99, 100, 117, 128)  # tokens of the prompts; a tenth of 100, a quarter of 99 show how either side rounds
KEEP = 0.25  # 1 - 0.75 is exact in binary, so that budgets differ only where a row says so
WINDOW = 8
VOCABULARY = 160  # more than the longest prompt, see `prepare`

# --- our methods with one difference of kvpress put in: evidence for the table, not methods to use -------------------


@dataclass(frozen=True)
class SnapKVZeros(kv.SnapKV):
    """SnapKV whose average pooling counts the zeros beyond both ends, as F.avg_pool1d does by default."""

    def score(self, step: kv.Step) -> torch.Tensor:
        votes = step.by_kv_head(step.rows(self.window).mean(2)).masked_fill(step.recent(self.window), 0.0)
        return F.avg_pool1d(votes, self.kernel, 1, self.kernel // 2)


@dataclass(frozen=True)
class PyramidKVWindowInside(kv.PyramidKV):
    """PyramidKV by kvpress's formula: the schedule holds the window instead of standing beside it.

    The layers' mean is keep * n, from 2 * keep * n - keep * n / beta down to keep * n / beta; where the top layer
    would get less than a window, every layer gets keep * n.
    """

    def target(self, step: kv.Step) -> torch.Tensor:
        n, window = step.n, self.protected()
        mean = n * self.keep
        low, high = mean / self.beta, 2 * mean - mean / self.beta
        if high >= n - window:
            low, high = 2 * mean - (n - window), n - window
        fits = n >= high >= low >= window
        count = round(high - step.layer * (high - low) / (step.depth - 1)) if fits else max(1, round(mean))
        return torch.full((1, 1), count)


@dataclass(frozen=True)
class ExpectedAttentionWithoutSinks(kv.ExpectedAttention):
    """Expected Attention whose softmax leaves the sinks out."""

    def expected(self, step: kv.Step) -> torch.Tensor:
        share = super().expected(step)  # b h n
        sinks = step.sinks(self.sinks).repeat_interleave(share.shape[1] // step.groups, 1)
        share = share.masked_fill(sinks, 0.0)
        return share / share.sum(-1, keepdim=True)


@dataclass(frozen=True)
class H2OPerVisibleRow(kv.H2O):
    """H2O whose sums are divided by the number of rows that could see the token: n for the first, 1 for the last."""

    def score(self, step: kv.Step) -> torch.Tensor:
        return super().score(step) / (step.cache.seen - step.index)


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One row: a method of ours for prompts of n tokens, and what it shows.

    Args:
        ours: Makes the method for a prompt of n tokens.
        why: What the row shows; the reasons were read in kvpress's code.
        changed: What differs from our method, for the rows that demonstrate a reason.
    """

    ours: Callable[[int], kv.EvictMethod]
    why: str
    changed: str = ""


@dataclass(frozen=True)
class Case:
    """A press and the methods of ours that are held against it."""

    name: str
    method: str
    press: str
    params: dict[str, Any]
    rows: tuple[Variant, ...]
    attention: str = "sdpa"

    @property
    def theirs(self) -> str:
        """How the press would be written."""
        return f"{self.press}({', '.join(f'{key}={value!r}' for key, value in self.params.items())})"


RATIO = {"compression_ratio": 1 - KEEP}
SNAP = RATIO | {"window_size": WINDOW, "kernel_size": 5}
SAME = "same formula, same budget"
CASES = (
    Case("streaming", "StreamingLLM", "StreamingLLMPress", RATIO | {"n_sink": 4},
         (Variant(lambda n: kv.StreamingLLM(KEEP, sinks=4), SAME),)),
    Case("knorm", "KNorm", "KnormPress", RATIO, (Variant(lambda n: kv.KNorm(KEEP), SAME),)),
    Case("keydiff", "KeyDiff", "KeyDiffPress", RATIO, (Variant(lambda n: kv.KeyDiff(KEEP), SAME),)),
    Case("tova", "TOVA", "TOVAPress", RATIO,
         (Variant(lambda n: kv.TOVA(KEEP), "same formula, same budget; the press compresses after the prompt, we at "
                  "every decode step too, which a prompt alone does not show"),)),
    Case("snapkv", "SnapKV", "SnapKVPress", SNAP, (
        Variant(lambda n: kv.SnapKV(KEEP, window=WINDOW),
                "the first two tokens and the last two before the window: kvpress, like the paper's code, pools over "
                "zeros beyond the ends and so lowers their scores, we average over the tokens that exist"),
        Variant(lambda n: SnapKVZeros(KEEP, window=WINDOW), "the zeros are the whole difference",
                "pooling counts zeros beyond both ends"),
    )),
    Case("pyramidkv", "PyramidKV", "PyramidKVPress", SNAP | {"compression_ratio": 0.5, "beta": 4}, (
        Variant(lambda n: kv.PyramidKV(0.5, base=kv.SnapKV(window=WINDOW), beta=4),
                "kvpress schedules the whole budget and counts the window inside it; we, like the paper's code, "
                "schedule what is left beside the window and add the window to every layer; and SnapKV's zeros"),
        Variant(lambda n: PyramidKVWindowInside(0.5, base=SnapKVZeros(window=WINDOW), beta=4),
                "schedule and zeros are the whole difference",
                "kvpress's schedule; pooling counts zeros beyond both ends"),
    )),
    Case("pyramidkv-quarter", "PyramidKV", "PyramidKVPress", SNAP | {"beta": 20}, (
        Variant(lambda n: kv.PyramidKV(KEEP, base=kv.SnapKV(window=WINDOW), beta=20),
                "as above; and where its schedule gives the top layer less than a window, kvpress keeps the same "
                "number in every layer: with the default beta of 20 at a quarter of the cache that is every budget "
                "below 20 windows (1280 tokens at kvpress's default window of 64)"),
        Variant(lambda n: SnapKVZeros(max(1, round(n * KEEP)), window=WINDOW),
                "here PyramidKVPress is SnapKVPress but for a budget that is rounded to the nearest count, not down",
                "SnapKV, the same rounded number in every layer; pooling counts zeros beyond both ends"),
    )),
    Case("expected", "ExpectedAttention", "ExpectedAttentionPress",
         RATIO | {"n_future_positions": 512, "n_sink": 4, "epsilon": 0.02}, (
        Variant(lambda n: kv.ExpectedAttention(KEEP, horizon=512, sinks=4, epsilon=0.02),
                "kvpress's softmax leaves the sinks out and so gives the other tokens a different weight in each of "
                "the query heads that share a KV head, and against epsilon; ours is over all tokens"),
        Variant(lambda n: ExpectedAttentionWithoutSinks(KEEP, horizon=512, sinks=4, epsilon=0.02),
                "the sinks in the softmax are the whole difference", "softmax without the sinks"),
    )),
    Case("observed", "H2O", "ObservedAttentionPress", RATIO, (
        Variant(lambda n: kv.H2O(KEEP),
                "H2O sums attention over all rows and gives half of the budget to the most recent tokens; "
                "ObservedAttentionPress divides by the number of rows that can see the token and protects none"),
        Variant(lambda n: kv.H2O(KEEP, recent=0), "only the division is left", "no recent tokens protected"),
        Variant(lambda n: H2OPerVisibleRow(KEEP, recent=0), "division and protection are the whole difference",
                "no recent tokens protected; sums divided by visible rows"),
    ), attention="eager"),
    Case("kvcompose", "KVCompose", "KVComposePress", RATIO,
         (Variant(lambda n: kv.KVCompose(KEEP), "same formula, same budgets of the layers"),), attention="eager"),
    Case("rounding", "KNorm", "KnormPress", {"compression_ratio": 0.9}, (
        Variant(lambda n: kv.KNorm(0.1),
                "kvpress keeps int(n * (1 - 0.9)), and 1 - 0.9 is a little below 0.1: 9 of 100 tokens; we keep 10"),
        Variant(lambda n: kv.KNorm(max(1, int(n * (1 - 0.9)))), "the count is the whole difference",
                "kvpress's number of tokens"),
    )),
    Case("control", "none", "KnormPress", RATIO,
         (Variant(lambda n: kv.RandomKV(KEEP), "what chance gives, for comparison: tokens drawn at random"),)),
)  # fmt: skip


@dataclass
class Agreement:
    """How far two selections agree.

    Attributes:
        shared: Positions that both keep.
        larger: For every layer and KV head the number that the side with more keeps, summed.
        same: Heads that keep exactly the same positions.
        heads: How many there are.
    """

    shared: int = 0
    larger: int = 0
    same: int = 0
    heads: int = 0
    kept_ours: list[str] = field(default_factory=list)
    kept_theirs: list[str] = field(default_factory=list)

    def add(self, ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> None:
        """Count one prompt: positions by layer and KV head.

        Raises:
            ValueError: If the two do not have the same layers and heads, or a head keeps a position twice.
        """
        shape = [[len(layer) for layer in side] for side in (ours, theirs)]
        if shape[0] != shape[1]:
            raise ValueError(f"ours has {shape[0]} KV heads by layer, theirs {shape[1]}: not the same model")
        for mine, other in ((a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)):
            if len(set(mine)) < len(mine) or len(set(other)) < len(other):
                raise ValueError("a head keeps a position twice")
            self.shared += len(set(mine) & set(other))
            self.larger += max(len(mine), len(other))
            self.same += set(mine) == set(other)
            self.heads += 1
        for counts, side in ((self.kept_ours, ours), (self.kept_theirs, theirs)):
            counts.append(" ".join("-".join(str(x) for x in sorted({len(head) for head in layer})) for layer in side))

    @property
    def positions(self) -> float:
        """Share of equal positions, 1 only if every head keeps the same; a head with fewer counts as missing some."""
        return self.shared / max(self.larger, 1)


# --- the two commands ------------------------------------------------------------------------------------------------


def checkpoint(seed: int = 0) -> LlamaForCausalLM:
    """A small Llama in fp32 with random weights, wide enough that attention has peaks instead of being uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
    return model


def prepare(folder: Path) -> None:
    """Write the checkpoint, the prompts and what kvpress is to run.

    No token comes twice in a prompt: in the first layer equal tokens have keys of equal norm, and the rounding of the
    rotary embedding would decide which of them KNorm keeps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randperm(VOCABULARY, generator=generator)[:n].tolist() for n in LENGTHS]
    cases = [{key: value for key, value in asdict(case).items() if key != "rows"} for case in CASES]
    (folder / "settings.json").write_text(json.dumps({"prompts": prompts, "cases": cases}, indent=1))


@torch.inference_mode()
def compare(folder: Path) -> tuple[pd.DataFrame, float]:
    """Hold what theirs.py wrote against our methods.

    Returns:
        The table, and the largest difference between the keys that the two environments computed, relative to the
        largest key.
    """
    settings = json.loads((folder / "settings.json").read_text())
    result = json.loads((folder / "theirs.json").read_text())
    theirs = {(entry["case"], entry["prompt"]): entry["layers"] for entry in result["kept"]}
    prompts = [torch.tensor([ids]) for ids in settings["prompts"]]
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    gap, keys = 0.0, load_file(folder / "theirs.safetensors")
    for i, ids in enumerate(prompts):
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for n, layer in enumerate(cache.layers):
            other = keys[f"{i}.{n}"]
            gap = max(gap, float((layer.keys - other).abs().max() / other.abs().max()))
    versions = {
        "kvpress": result["versions"]["kvpress"],
        "torch": version("torch").partition("+")[0],
        "transformers_ours": version("transformers"),
        "transformers_theirs": result["versions"]["transformers"],
        "date": date.today().isoformat(),
    }
    rows = []
    for case in CASES:
        for variant in case.rows:
            agreement = Agreement()
            for i, ids in enumerate(prompts):
                with variant.ours(ids.shape[1])(model) as trace:
                    model(ids)
                agreement.add([layer[0].tolist() for layer in trace.kept], theirs[case.name, i])
            row = {"method": case.method, "press": case.press, "ours": repr(variant.ours(LENGTHS[-1]))}
            row |= {"theirs": case.theirs, "variant": variant.changed}
            row |= {"positions": agreement.positions, "heads_equal": agreement.same, "heads": agreement.heads}
            row |= {"kept_ours": "; ".join(agreement.kept_ours), "kept_theirs": "; ".join(agreement.kept_theirs)}
            rows.append(row | {"why": variant.why} | versions)
    return pd.DataFrame(rows, columns=list(COLUMNS)), gap


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare kept positions with kvpress; see parity/README.md.")
    parser.add_argument("command", choices=("prepare", "compare"))
    parser.add_argument("folder", type=Path, help="where checkpoint, settings and their answer lie")
    given = parser.parse_args()
    disable_progress_bar()
    if given.command == "prepare":
        prepare(given.folder)
        return
    table, gap = compare(given.folder)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(TABLE, index=False, float_format="%.4f")
    print(table[["method", "press", "variant", "positions", "heads_equal", "heads"]].to_markdown(index=False))
    print(f"keys of the two environments differ by at most {gap:.1e} of the largest key; written to {TABLE}")


if __name__ == "__main__":
    main()
