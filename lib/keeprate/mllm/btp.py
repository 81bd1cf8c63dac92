"""BTP: early cuts keep what differs, later ones what the prompt's last token looks at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import Inside, best, check_layers, dropped, first
from keeprate.mllm.staged import StagedMethod, at_depth
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("attention rows", "features"))
@dataclass(frozen=True)
class BTP(StagedMethod):
    """Three cuts that shift from diversity to attention, then no visual token at all in the last layers.

    A cut to k tokens joins, in this order until k are there: `attention` k tokens with most attention from the prompt's
    last token in the layer before, balanced over places (`rebalance`); `diversity` k tokens that are greedily far from
    each other in cosine distance; at the first cut `spatial` k tokens spread over the image by greedy Manhattan
    distance from its first token; and tokens farthest from all of these. The paper finds its layers on a calibration
    set, here they are given. Where the parts exceed k, published code keeps more than k; the order is ours. In front of
    flash attention it averages the heads' logits; here the mean is of probabilities.

    Args:
        keep: Shares left by the cuts, or what the last one leaves.
        layers: 0-based first layers that see fewer tokens; None = 3, 6, 14 and 22 of 32, scaled to the depth.
        leave: Whether the last of these layers sees no visual token; otherwise it is left out.
        attention: Share of k that attention chooses, one entry a cut.
        diversity: Share of k that diversity chooses, one entry a cut.
        extra: How many times more candidates than places attention has, one entry a cut.
        spatial: Share of k, at the first cut.

    Source: Li et al. 2025 (2505.22038) and its code.
    """

    policy: ClassVar[str] = "keep"
    where: ClassVar[tuple[int, ...]] = (3, 6, 14, 22)

    keep: float | int | tuple = (288 / 576, 144 / 576, 48 / 576)
    leave: bool = True
    attention: tuple[float, ...] = (0.3, 0.9, 1.0)
    diversity: tuple[float, ...] = (0.3, 0.1, 0.0)
    extra: tuple[float, ...] = (3.7, 1.5, 1.2)
    spatial: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        for name, low, high in (("attention", 0, 1), ("diversity", 0, 1), ("extra", 1, float("inf"))):
            entries = getattr(self, name)
            if not isinstance(entries, tuple | list) or len(entries) != len(self.attention):
                raise ValueError(f"attention, diversity and extra must hold one number a cut; got {name}={entries!r}")
            for entry in entries:
                number(f"an entry of {name}", entry, low, high)
        number("spatial", self.spatial, 0, 1)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is None:
            layers = at_depth(self.where if self.leave else self.where[:-1], depth)
        else:
            layers = check_layers(self.layers, depth)
        cuts = len(layers) - self.leave
        if cuts != len(self.attention):
            raise ValueError(f"{self.name} cuts {cuts} times at {layers}; attention says how for {len(self.attention)}")
        self.check_schedule(cuts)
        return layers

    def stages(self, depth: int) -> int:
        return len(self.layers_at(depth)) - self.leave

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        if t.stage <= self.stages(t.depth):
            return super().inside(t)
        return None if self.budget.keep == 1 else torch.zeros(t.slot.shape, dtype=torch.bool, device=t.slot.device)

    def score(self, t: Inside) -> torch.Tensor:
        return t.from_last().mean(1)

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        count = torch.minimum(self.count(t, scores), t.count)
        attention, diversity, extra = (x[t.stage - 1] for x in (self.attention, self.diversity, self.extra))
        looks = rebalance(scores, _part(attention, count), extra, count, t.valid)
        chosen = looks.float() * 4
        if diversity > 0:
            far = _part(diversity, count)
            order, _ = farthest_point(t.x, max(1, int(far.max())), start="isolated", valid=t.valid)
            chosen += first(order, far, t.v) * 2
        if t.stage == 1 and self.spatial > 0:
            spread = _part(self.spatial, count)
            k = max(1, int(spread.max()))
            order, _ = farthest_point(manhattan(_places(t)), k, metric="distance", start=0, valid=t.valid)
            # tokens chosen early are the most spread
            early = 2 - torch.arange(k, device=order.device) / k
            early = early.masked_fill(torch.arange(k, device=order.device) >= spread[:, None], 0.0)
            chosen += torch.zeros_like(chosen).scatter(1, order, early) / 2
        picked = best(chosen, torch.minimum(count, (chosen > 0).sum(1)), t.valid)
        return dropped(top_up(t.x, picked, count, t.valid), t.hide(scores))


def _part(share: float, count: torch.Tensor) -> torch.Tensor:
    return (share * count + 1e-6).long()


def rebalance(
    scores: torch.Tensor, want: torch.Tensor, extra: float, early: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Among `extra` times as many candidates of high score as wanted, prefer those that stand early in the sequence.

    Attention from the last token favours what stands near it; the preference undoes that.

    Args:
        scores: [b, v].
        want: [b] tokens to choose.
        extra: Candidates for each of them.
        early: [b] tokens that count as early.
        valid: [b, v] tokens that exist.

    Returns:
        [b, v] mask.
    """
    exists = torch.full_like(want, scores.shape[1]) if valid is None else valid.sum(1)
    candidate = best(scores, torch.minimum((extra * want + 1e-6).long(), exists), valid)
    rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    place = torch.arange(scores.shape[1], device=scores.device)
    rank = rank + scores.shape[1] * (place >= early[:, None])
    return best(-rank.float(), want, candidate)


def manhattan(place: torch.Tensor) -> torch.Tensor:
    """Distances [b, n, n] of places [b, n, 4]: image, view, row, column; views lie farther apart than tokens of one."""
    spot = place[..., 2:].float()
    gap = torch.cdist(spot, spot, p=1)
    other = (place[:, :, None, :2] != place[:, None, :, :2]).any(-1)
    return gap + other * (gap.amax() + 1)


def _places(t: Inside) -> torch.Tensor:
    """[b, v, 4] image, view, row and column of the visual tokens; a token without a place gets its number as column."""
    column = torch.where(t.place[..., 3] < 0, t.ids, t.place[..., 3])
    return torch.cat([t.place[..., :3], column[..., None]], -1)


def top_up(x: torch.Tensor, chosen: torch.Tensor, count: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Add the tokens farthest from all chosen ones, one after the other, until there are `count`.

    Args:
        x: [b, v, d], compared by cosine.
        chosen: [b, v]; of a sample with none, the token that is farthest from its nearest neighbour is the first.
        count: [b] at most the tokens there are.
        valid: [b, v] tokens that exist.

    Returns:
        [b, v] mask.
    """
    empty = ~chosen.any(1, keepdim=True)
    if bool(empty.any()):
        isolated, _ = farthest_point(x, 1, start="isolated", valid=valid)
        chosen = torch.where(empty, torch.zeros_like(chosen).scatter(1, isolated, True), chosen)
    missing = count - chosen.sum(1)
    if not bool((missing > 0).any()):
        return chosen
    gap = (1 - score.similarity(x)).clamp_min(0)
    # all that is chosen counts as one token, as far from another as the nearest of them
    one = chosen.to(torch.uint8).argmax(1)
    nearest = gap.masked_fill(~chosen[:, None], float("inf")).amin(-1)
    gap = gap.scatter(1, one[:, None, None].expand(-1, 1, x.shape[1]), nearest[:, None])
    free = ~chosen if valid is None else ~chosen & valid
    free = free.scatter(1, one[:, None], True)
    order, _ = farthest_point(gap, min(int(missing.max()) + 1, x.shape[1]), metric="distance", start=one, valid=free)
    return chosen | first(order[:, 1:], missing, x.shape[1])
