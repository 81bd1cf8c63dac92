"""Reduce: what becomes of the tokens that are not kept?

A `Reduction` is one decision that applies to any tensor: n tokens become m slots. It runs in two ways that give the
same
result: physically (the sequence gets shorter) and masked (the length stays, dropped tokens are hidden from attention),
the second being what training needs.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from keeprate.score import similarity
from keeprate.select import ragged, rest


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [b, n, ...] at positions index [b, m] -> [b, m, ...]."""
    if x.dim() == 2:
        return x.gather(1, index)
    # whole rows of the flattened batch: several times faster than a gather with an index for every element
    return x.flatten(0, 1).index_select(0, flat_positions(index, x.shape[1])).view(*index.shape, *x.shape[2:])


def flat_positions(index: torch.Tensor, n: int) -> torch.Tensor:
    """Positions index [b, m] in 0..n-1 -> [b * m] positions in the batch's rows, n rows a sample."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * n).flatten()


@dataclass(frozen=True)
class Reduction:
    """n tokens become m slots.

    Attributes:
        rep: [b, m] position of the token that stands for each slot; sorted, unique; summary slots come last.
        slot: [b, n] slot that every token joins, -1 = dropped; None when each slot is its representative alone.
        weight: [b, n] non-negative weight of each token in its slot; None = all equal.
        average: True divides by the slot's sum of weights, False leaves the weighted sum.
        summaries: Number of last slots that summarise many tokens and stand for no single one.
        valid: [b, m], False = padding of a ragged batch; None = all slots exist.
        score: [b, n] the scores behind the decision, kept for the trace.
        gate: [b, n] differentiable keep gates for training (straight-through samples); masked execution only.
    """

    rep: torch.Tensor
    slot: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    average: bool = True
    summaries: int = 0
    valid: torch.Tensor | None = None
    score: torch.Tensor | None = None
    gate: torch.Tensor | None = None

    @property
    def m(self) -> int:
        """Number of slots."""
        return self.rep.shape[1]

    def slots(self, n: int) -> torch.Tensor:
        """[b, n] slot of every token, -1 = dropped."""
        if self.slot is not None:
            return self.slot
        own = torch.arange(self.m, device=self.rep.device).expand_as(self.rep)
        if self.valid is not None:
            own = own.masked_fill(~self.valid, -1)
        return self.rep.new_full((len(self.rep), n), -1).scatter(1, self.rep, own)

    @cached_property
    def moved(self) -> torch.Tensor:
        """[b, n - m] the tokens that stand for no slot: they join another, or are dropped.

        In a ragged batch samples with fewer of them repeat tokens that do stand for a slot; `_stays` tells them apart.
        """
        if self.valid is None:
            return rest(self.rep, self.slot.shape[1])
        return self._stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, : int((~self._stays).sum(1).max())]

    @cached_property
    def _stays(self) -> torch.Tensor:
        """[b, n] whether a token stands for a slot that exists."""
        there = torch.ones_like(self.rep) if self.valid is None else self.valid.long()
        return torch.zeros_like(self.slot).scatter_add(1, self.rep, there) > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Physical execution on features: [b, n, d] -> [b, m, d]. Only the rows that move are touched twice."""
        y = gather_tokens(x, self.rep)
        if self.slot is None:
            return y
        base, slot = y.float(), self.slot.gather(1, self.moved)
        there = slot.clamp_min(0)
        weight = torch.ones(x.shape[:2], device=x.device) if self.weight is None else self.weight.float()
        own, extra = weight.gather(1, self.rep), weight.gather(1, self.moved) * (slot >= 0)
        if self.valid is not None:
            extra = extra * ~self._stays.gather(1, self.moved)
        part = gather_tokens(x, self.moved).float()
        if self.average:
            # the weighted mean as a step from the representative; a slot of no weight at all keeps its representative
            extra = extra / self.total(weight).gather(1, there).clamp_min(1e-12)
            part = part - gather_tokens(base, there)
        else:
            base = own[..., None] * base
        y = base.flatten(0, 1).index_add(0, flat_positions(there, self.m), (extra[..., None] * part).flatten(0, 1))
        return y.view(base.shape).to(x.dtype)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the members of every slot (sizes): [b, n] -> [b, m]."""
        if self.slot is None:
            y = x.gather(1, self.rep)
            return y if self.valid is None else y.masked_fill(~self.valid, 0)
        bins = torch.zeros(len(x), self.m + 1, device=x.device, dtype=x.dtype)  # column 0 is for the dropped
        return bins.scatter_add(1, self.slot + 1, x)[:, 1:]

    def masked(self, x: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked execution: the same values, written to the representatives, in a sequence of unchanged length.

        Args:
            x: [b, n0, d] full-length features.
            alive: [b, n] positions in the full sequence of the n tokens this reduction speaks of.

        Returns:
            (x with the slots' values at their representatives, [b, m] positions that are alive from here on).
        """
        y = self(gather_tokens(x, alive))
        alive = alive.gather(1, self.rep)
        return x.scatter(1, alive[..., None].expand_as(y), y), alive

    def unmerge(self, y: torch.Tensor, n: int) -> torch.Tensor:
        """Copy each slot's value back to its members; dropped tokens get 0: [b, m, d] -> [b, n, d]."""
        slot = self.slots(n)
        return gather_tokens(y, slot.clamp_min(0)) * (slot >= 0)[..., None]

    def after_prefix(self, prefix: int) -> "Reduction":
        """The same decision for a sequence with `prefix` protected tokens in front, which stay as they are."""
        if prefix == 0:
            return self
        b = len(self.rep)
        own = torch.arange(prefix, device=self.rep.device).expand(b, -1)

        def extend(x: torch.Tensor | None, front: torch.Tensor) -> torch.Tensor | None:
            return None if x is None else torch.cat([front.to(x.dtype), x], 1)

        ones = torch.ones(b, prefix, device=self.rep.device)
        slot = None if self.slot is None else torch.where(self.slot < 0, self.slot, self.slot + prefix)
        return replace(
            self,
            rep=torch.cat([own, self.rep + prefix], 1),
            slot=extend(slot, own),
            weight=extend(self.weight, ones),
            valid=extend(self.valid, ones),
            score=None,
            gate=extend(self.gate, ones),
        )


def drop(kept: torch.Tensor, valid: torch.Tensor | None = None, **extra: torch.Tensor) -> Reduction:
    """Keep the given positions, drop the rest. kept: [b, k] sorted; extra: `score` or `gate` of the Reduction."""
    return Reduction(rep=kept, valid=valid, **extra)


def fuse_rest(kept: torch.Tensor, weight: torch.Tensor, *, average: bool = False, **extra: torch.Tensor) -> Reduction:
    """Keep the given positions and fuse all others into one extra token.

    Args:
        kept: [b, k] sorted positions, k < n.
        weight: [b, n] weights of the others; the sum is not renormalised unless `average`.
        average: Divide by the sum of weights.

    Source: EViT (2202.07800), inattentive token fusion.
    """
    (b, n), k = weight.shape, kept.shape[1]
    slot = torch.full((b, n), k, device=kept.device).scatter(1, kept, torch.arange(k, device=kept.device).expand(b, -1))
    host = weight.float().scatter(1, kept, float("-inf")).argmax(1, keepdim=True)
    weight = weight.float().scatter(1, kept, 1.0)
    return Reduction(torch.cat([kept, host], 1), slot, weight, average, summaries=1, **extra)


def merge(
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    rep: torch.Tensor | None = None,
    k: int | None = None,
    **extra: torch.Tensor,
) -> Reduction:
    """Weighted mean of every cluster.

    Args:
        labels: [b, n] clusters 0..k-1, none empty; -1 = dropped.
        weight: [b, n] weights in the mean; None = equal.
        rep: [b, k] representative of each cluster; its first member when None.
        k: Number of clusters (found from the labels when neither it nor `rep` is given).
    """
    b, n = labels.shape
    if rep is None:
        k = int(labels.max()) + 1 if k is None else k
        index = torch.arange(n, device=labels.device).expand(b, n)
        bins = labels.new_full((b, k + 1), n).scatter_reduce(1, labels + 1, index, "amin")
        rep = bins[:, 1:]
        if (rep == n).any():
            raise ValueError(f"labels leave some of the {k} clusters empty")
    rep, order = rep.sort(1)
    new = order.argsort(1)  # old label -> slot in raster order of the representatives
    slot = torch.where(labels < 0, labels, new.gather(1, labels.clamp_min(0)))
    return Reduction(rep, slot, weight, **extra)


def join(home: torch.Tensor, weight: torch.Tensor | None = None, **extra: torch.Tensor) -> Reduction:
    """Every token joins the one it is told to; samples may keep different numbers.

    Args:
        home: [b, n] position of the token that each one joins, its own where it stays, -1 = dropped.
        weight: [b, n] weights in the mean; None = equal.
    """
    stays = home == torch.arange(home.shape[1], device=home.device)
    kept = ragged(stays)
    slot = (stays.long().cumsum(1) - 1).gather(1, home.clamp_min(0)).masked_fill(home < 0, -1)
    return Reduction(kept.index, slot, weight, valid=kept.valid, **extra)


def merge_pairs(source: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, **extra: torch.Tensor) -> Reduction:
    """Merge source tokens into their targets, several sources may share one; all others stay.

    Args:
        source, target: [b, r] positions; sources are unique and no source is a target.
        weight: [b, n] weights in the mean, such as token sizes.
    """
    b, n = weight.shape
    goes = torch.zeros(b, n, dtype=torch.bool, device=weight.device).scatter(1, source, True)
    rep = goes.to(torch.uint8).sort(dim=1, stable=True).indices[:, : n - source.shape[1]]
    slot = (~goes).long().cumsum(1) - 1
    return Reduction(rep, slot.scatter(1, source, slot.gather(1, target)), weight, **extra)


def merge_into(
    kept: torch.Tensor, metric: torch.Tensor, weight: torch.Tensor | None = None, **extra: torch.Tensor
) -> Reduction:
    """Every token that is not kept joins its most similar (cosine) kept one.

    Args:
        kept: [b, k] sorted positions.
        metric: [b, n, c] features to compare.
        weight: [b, n] weights in the mean.
    """
    slot = similarity(metric, gather_tokens(metric, kept)).argmax(-1)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return Reduction(kept, slot.scatter(1, kept, own), weight, **extra)


def soft_mix(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Every output token is a convex mixture of all: x [b, n, d], mix [b, m, n] with rows summing to 1 -> [b, m, d].

    Raises:
        ValueError: If the rows of `mix` do not sum to 1.
    """
    if not torch.allclose(mix.float().sum(-1), torch.ones(mix.shape[:2], device=mix.device), atol=1e-3):
        raise ValueError("rows of mix must sum to 1 over the tokens")
    return mix.to(x.dtype) @ x


def scatter_back(full: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Re-join parked tokens: `full` [b, n, d] with the processed y [b, m, d] at positions index [b, m]."""
    return full.scatter(1, index[..., None].expand_as(y), y.to(full.dtype))


def reconstruct(
    features: torch.Tensor, centres: torch.Tensor, refined: torch.Tensor, k: int = 20, tau: float = 0.01
) -> torch.Tensor:
    """Full-length features from a few refined centres, weighted by how near they were at clustering time.

    Args:
        features: [b, n, d] tokens when they were clustered.
        centres: [b, m, d] cluster centres at that time.
        refined: [b, m, d] the centres after the remaining layers.
        k: Nearest centres used per token.
        tau: Inverse temperature of exp(-tau ||x - c||^2).

    Returns:
        [b, n, d].

    Source: Expedit (Liang et al. 2022), token reconstruction; here the weights sum to 1.
    """
    near, index = (-tau * torch.cdist(features.float(), centres.float()).square()).topk(min(k, centres.shape[1]), -1)
    picked = gather_tokens(refined, index.flatten(1)).view(*index.shape, -1)
    return (near.softmax(-1).to(picked.dtype)[..., None] * picked).sum(2)


def visible(alive: torch.Tensor, n: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Boolean [b, n]: which positions of the full sequence may be attended to in masked execution."""
    there = torch.ones_like(alive, dtype=torch.bool) if valid is None else valid
    return torch.zeros(len(alive), n, dtype=torch.bool, device=alive.device).scatter(1, alive, there)
