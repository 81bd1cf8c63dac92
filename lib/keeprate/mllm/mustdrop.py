"""MustDrop: merge alike neighbours, then drop what the question looks at neither on the whole nor with any word."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from keeprate.anatomy import Multimodal
from keeprate.budget import Budget
from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import Inside, Visual, best, dropped
from keeprate.mllm.staged import StagedMethod
from keeprate.reduce import Reduction, join


@register(kind="merging", needs=("class attention", "attention rows", "features"))
@dataclass(frozen=True)
class MustDrop(StagedMethod):
    """Window merging before the language model, a key set that always stays, and a filter of two attentions inside it.

    Windows of neighbours whose mean pairwise cosine reaches `similarity` become their mean. The `key` share of tokens
    with most class attention in the last vision block is never dropped. At each stage a token is dropped if both its
    share of the question's attention is below thr_g and the largest attention any word pays it is below thr_i, in the
    layer before, mean over heads; that is a threshold thr_g on max(g_j / sum g, u_j thr_g / thr_i), and without
    thresholds the highest of these stay. After the prompt, the cache of every layer is cut to the final set.

    Published code merges windows after the first vision block, which spares the encoder work; here features merge
    before the language model, and a merged token stands where its member of most class attention does. The cache of the
    layers before the first drop is cut too.

    Args:
        keep: Shares left by each stage, or what the last one leaves; Budget(threshold=thr_g) is the paper's rule, with
            0.001, 0.0012 and 0.011 for 192, 128 and 64 of 576 tokens on average. The key set comes on top.
        layers: 0-based first layers that see fewer tokens; None = 3, 7, 11 and 15 of 32, scaled to the depth.
        ratio: thr_i / thr_g, published as 1, 0.83 and 0.91.
        window: Side of the windows; 1 = none are merged.
        similarity: Cosine from which a window is merged.
        key: Share of the tokens in the key set.

    Source: Liu et al. 2024 (2411.10803).
    """

    text_guided: ClassVar[bool] = True
    output_aware: ClassVar[bool] = True
    where: ClassVar[tuple[int, ...]] = (3, 7, 11, 15)

    keep: float | int | tuple | Budget = 1 / 9
    ratio: float = 1.0
    window: int = 3
    similarity: float = 0.8
    key: float = 0.08

    def __post_init__(self):
        super().__post_init__()
        whole("window", self.window)
        number("similarity", self.similarity, -1, 1)
        number("key", self.key, 0, 1)
        if number("ratio", self.ratio, 0) == 0:
            raise ValueError("ratio must be positive; got 0")

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (-1,)

    def before(self, t: Visual) -> Reduction | None:
        if self.window == 1 or self.budget.keep == 1:
            return None
        home = merge_windows(t.features, t.place, t.importance(-1), t.valid, self.window, self.similarity)
        alone = home == torch.arange(t.n, device=home.device)
        if bool((alone if t.valid is None else alone | ~t.valid).all()):
            return None
        return join(home)

    def inside(self, t: Inside) -> Reduction | None:
        if t.stage == 1 and self.key > 0 and self.budget.keep != 1:
            size = (self.key * t.count.double() - 1e-9).ceil().long()
            key = best(_importance(t), size, t.valid)
            t.carry("key").scatter_(1, t.slot, key.float())
        return super().inside(t)

    def score(self, t: Inside) -> torch.Tensor:
        rows = t.columns(t.attention.rows(t.text_slot)).mean(1)  # b t v
        rows = rows if t.text_valid is None else rows * t.text_valid[..., None]
        looks = rows.sum(1) if t.valid is None else rows.sum(1) * t.valid
        return torch.maximum(looks / looks.sum(1, keepdim=True).clamp_min(1e-12), rows.amax(1) / self.ratio)

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        key = t.visual(t.carry("key")) > 0
        keep = best(scores, self.count(t, scores), t.valid)
        return dropped(keep | (key if t.valid is None else key & t.valid), t.hide(scores))


def merge_windows(
    features: torch.Tensor,
    place: torch.Tensor,
    importance: torch.Tensor,
    valid: torch.Tensor | None,
    window: int,
    similarity: float,
) -> torch.Tensor:
    """Where each token goes if windows of tokens that are alike become one.

    Args:
        features: [i, n, c] what is compared.
        place: [i, n, 3] view, row and column; -1 = nowhere, alone.
        importance: [i, n] the highest of a window stands for it.
        valid: [i, n] tokens that exist.
        window: Side of a window; at the border of a view it may hold fewer tokens.
        similarity: Mean cosine of a window's pairs from which it is merged.

    Returns:
        [i, n] position of the token that each one joins, -1 = padding.
    """
    own = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    there = torch.ones_like(own, dtype=torch.bool) if valid is None else valid
    cell = torch.cat([place[..., :1], place[..., 1:] // window], -1)
    sides = cell.clamp_min(0).flatten(0, 1).amax(0) + 1
    label = (cell[..., 0] * sides[1] + cell[..., 1]) * sides[2] + cell[..., 2]
    windows = int(sides.prod())
    label = torch.where(there & (place >= 0).all(-1), label, windows + own)
    bins = (len(own), windows + own.shape[1])
    unit = F.normalize(features.float(), dim=-1)
    total = unit.new_zeros(*bins, unit.shape[2]).scatter_add(1, label[..., None].expand_as(unit), unit)
    count = unit.new_zeros(bins).scatter_add(1, label, torch.ones_like(label, dtype=unit.dtype))
    # all pairs of a window: the square of the sum, without each token with itself
    pairs = total.square().sum(-1) - unit.new_zeros(bins).scatter_add(1, label, unit.square().sum(-1))
    alike = (count > 1) & (pairs >= similarity * count * (count - 1))
    most = unit.new_full(bins, float("-inf")).scatter_reduce(1, label, importance.float(), "amax")
    top = importance >= most.gather(1, label)
    first = own.new_full(bins, own.shape[1]).scatter_reduce(1, label, own.masked_fill(~top, own.shape[1]), "amin")
    return torch.where(alike.gather(1, label), first.gather(1, label), own).masked_fill(~there, -1)


def _importance(t: Inside) -> torch.Tensor:
    """[b, v] class attention (received attention without a class token) in the last vision block; -inf = line end."""
    encoder = t.session.encoder
    heads = encoder.class_attention if t.parts.has_cls else encoder.received
    return t.session.of_tokens(heads(-1).mean(1).nan_to_num(float("-inf")), t.ids)
