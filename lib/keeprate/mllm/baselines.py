"""The baselines of this family: random tokens, a uniform grid, average pooling, and the tokens that are needed."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import choice
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Choice, Inside, InsideMethod, Visual, check_layers, dropped
from keeprate.reduce import Reduction, join


@register(kind="baseline")
@dataclass(frozen=True)
class RandomVisual(BeforeMethod):
    """Keep a uniformly random set of every image's tokens."""

    def score(self, t: Visual) -> torch.Tensor:
        return score.random(t.x.shape[:2], t.generator, t.x.device)


@register(kind="baseline")
@dataclass(frozen=True)
class RandomInside(InsideMethod):
    """Keep a uniformly random set of a sample's visual tokens from one decoder layer on.

    Args:
        layer: 0-based layer before which the others are dropped, FastV's K.
    """

    policy: ClassVar[str] = "keep"

    layer: int = 2

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((self.layer,), depth)

    def score(self, t: Inside) -> torch.Tensor:
        return score.random(t.ids.shape, t.generator, t.ids.device)


@register(kind="baseline")
@dataclass(frozen=True)
class UniformGrid(BeforeMethod):
    """Keep tokens at a regular stride in reading order: numbers floor((i + 1/2) n / k) for i = 0..k-1."""

    def before(self, t: Visual) -> torch.Tensor | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        step = torch.arange(int(count.max()), device=t.x.device)
        index = ((2 * step + 1) * t.total[:, None] // (2 * count[:, None])).clamp_max(t.n - 1)  # i k, in whole numbers
        there = step < count[:, None]
        keep = torch.zeros(t.x.shape[:2], dtype=torch.int8, device=t.x.device)
        return dropped(keep.scatter_add(1, index, there.to(torch.int8)) > 0)


@register(kind="baseline")
@dataclass(frozen=True)
class Pooling(BeforeMethod):
    """Replace blocks of neighbouring tokens by their mean (or maximum of every channel).

    Each view is cut into blocks whose sides differ by at most one token, as adaptive pooling does. The number of blocks
    is the product of two whole numbers: the largest at most k that is as near to the view's shape as possible, so an
    image keeps at most k tokens, and the token in the middle of a block gives its position.

    Args:
        mode: "mean" or "max".
    """

    mode: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        choice("mode", self.mode, ("mean", "max"))

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        home = block_centres(t.place, t.valid, count)
        if self.mode == "mean":
            return join(home)
        reduction = join(home)
        slot = reduction.slots(t.n).clamp_min(0)[..., None].expand_as(t.x)
        low = t.x.new_full((len(t.x), reduction.m, t.x.shape[2]), float("-inf"))
        gone = (home < 0)[..., None]
        return Choice(reduction, low.scatter_reduce(1, slot, t.x.masked_fill(gone, float("-inf")), "amax"))


def block_centres(place: torch.Tensor, valid: torch.Tensor | None, count: torch.Tensor) -> torch.Tensor:
    """Cut every view into at most its share of `count` blocks, and find the token in the middle of each.

    Args:
        place: [i, n, 3] view, row and column of each token.
        valid: [i, n] False = padding.
        count: [i] blocks an image may have. A view gets its share of them, rounded down, but one at least, which others
            pay for; with fewer blocks than views the last views get none.

    Returns:
        [i, n] position of the middle token of every token's block, -1 = padding, or a view without a block. An image
        that may have a block for every token is left as it is.
    """
    i, n = place.shape[:2]
    there = torch.ones(i, n, dtype=torch.bool, device=place.device) if valid is None else valid
    view, spot = place[..., 0].clamp_min(0), place[..., 1:]
    views = int(view.max()) + 1
    tokens = torch.zeros(i, views, dtype=torch.long, device=place.device).scatter_add(1, view, there.long())
    big = torch.iinfo(torch.long).max
    at = view[..., None].expand_as(spot)
    hidden = ~there[..., None]
    low = spot.new_full((i, views, 2), big).scatter_reduce(1, at, spot.masked_fill(hidden, big), "amin")
    high = spot.new_full((i, views, 2), -1).scatter_reduce(1, at, spot.masked_fill(hidden, -1), "amax")
    side = (high - low + 1).clamp_min(1)  # i views 2
    used = tokens > 0
    one = (used & (used.long().cumsum(1) <= count[:, None])).long()
    more = (count[:, None] * tokens // tokens.sum(1, keepdim=True) - 1).clamp_min(0) * one
    room = count[:, None] - one.sum(1, keepdim=True) - more.cumsum(1) + more  # what the views before leave
    share = one + torch.minimum(more, room.clamp_min(0))
    rows = (side[..., 0] * (share / tokens.clamp_min(1)).sqrt()).round().long()
    rows = torch.minimum(rows, torch.minimum(side[..., 0], share)).clamp_min(1)
    cols = torch.minimum(share // rows, side[..., 1])
    cut = torch.stack([rows, cols], -1).gather(1, at)  # i n 2: blocks along each axis of a token's view
    block = (spot - low.gather(1, at)) * cut // side.gather(1, at)
    first = (rows * cols).cumsum(1) - rows * cols
    there = there & (share.gather(1, view) > 0)
    label = (first.gather(1, view) + block[..., 0] * cut[..., 1] + block[..., 1]).masked_fill(~there, 0)
    # the token nearest the middle of its block
    mass = torch.zeros(i, n, device=place.device).scatter_add(1, label, there.float()).clamp_min(1)
    middle = torch.zeros(i, n, 2, device=place.device)
    middle = middle.scatter_add(1, label[..., None].expand_as(spot), spot.float() * there[..., None]) / mass[..., None]
    gap = (spot - middle.gather(1, label[..., None].expand_as(spot))).square().sum(-1).masked_fill(~there, float("inf"))
    least = gap.new_full((i, n), float("inf")).scatter_reduce(1, label, gap, "amin")
    index = torch.arange(n, device=place.device).expand(i, n)
    near = index.masked_fill((gap > least.gather(1, label) + 1e-6) | ~there, n)
    centre = torch.full((i, n), n, device=place.device).scatter_reduce(1, label, near, "amin").gather(1, label)
    every = (count >= tokens.sum(1))[:, None]  # also where a view is no rectangle
    return torch.where(every, index, centre).masked_fill(~there, -1)


@register(kind="baseline", needs=("the truth",))
@dataclass(frozen=True)
class OracleVisual(BeforeMethod):
    """Keep the tokens that a task says are needed, then random ones: no method, but the line above the others.

    Args:
        needed: [i, n] bool or float for the images of one batch, higher = needed.
    """

    needed: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def score(self, t: Visual) -> torch.Tensor:
        if self.needed is None or self.needed.shape != t.x.shape[:2]:
            given = None if self.needed is None else tuple(self.needed.shape)
            raise ValueError(f"OracleVisual needs the truth of this batch, {tuple(t.x.shape[:2])}; got {given}")
        degree = self.needed.to(t.x.device).unique(return_inverse=True)[1]  # chance decides among equals alone
        return degree * 2 + score.random(t.x.shape[:2], t.generator, t.x.device)
