"""Pages and blocks of cached tokens, counted from every sample's first real token, so that padding moves none."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from keeprate.kv.base import Step


@dataclass(frozen=True)
class Blocks:
    """The full blocks of a cache whose slots are the tokens in order of arrival.

    Attributes:
        slots: [b, c, size] slots of every block; a sample with fewer blocks repeats the last slot.
        full: [b, c] which blocks a sample has.
        tail: [b, n] slots behind the last full block.
    """

    slots: torch.Tensor
    full: torch.Tensor
    tail: torch.Tensor

    @classmethod
    def of(cls, step: Step, size: int) -> "Blocks":
        """Blocks of `size` tokens."""
        start = step.start[:, 0, 0]
        count = (step.n - start) // size  # b
        many = torch.arange(int(count.max()), device=start.device)
        slots = start[:, None, None] + many[:, None] * size + torch.arange(size, device=start.device)
        tail = torch.arange(step.n, device=start.device) >= (start + count * size)[:, None]
        return cls(slots.clamp_max(step.n - 1), many < count[:, None], tail)

    def take(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Tokens of the blocks from `first` on: x [b, g, n, ...] -> [b, g, c - first, size, ...]."""
        slots = self.slots[:, first:]
        where = slots.flatten(1)[:, None].expand(-1, x.shape[1], -1)
        where = where.view(*where.shape, *(1,) * (x.dim() - 3)).expand(*where.shape, *x.shape[3:])
        return x.gather(2, where).unflatten(2, slots.shape[1:])

    def tokens(self, chosen: torch.Tensor) -> torch.Tensor:
        """Mask over slots: blocks chosen [b, g, c] -> [b, g, n], the tail included."""
        b, g, _ = chosen.shape
        pick = (chosen & self.full[:, None])[..., None].expand(-1, -1, -1, self.slots.shape[2]).flatten(2)
        where = self.slots.flatten(1)[:, None].expand(-1, g, -1)
        read = torch.zeros(b, g, self.tail.shape[1], dtype=torch.int8, device=chosen.device)
        return (read.scatter_add(2, where, pick.to(torch.int8)) > 0) | self.tail[:, None]


def remembered(
    step: Step, name: str, blocks: Blocks, compute: Callable[[int], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """What is known of every block, computed once a block and kept with the cache.

    Args:
        step: The layer.
        name: Under which it is kept.
        blocks: Today's blocks.
        compute: From a first block on, tensors [b, g, c - first, ...] for the blocks behind it.
    """
    held, settled = step.cache.extra.get(name, (None, 0))
    if held is None or settled < blocks.full.shape[1]:
        new = compute(settled)
        held = (
            new if held is None else tuple(torch.cat([a[:, :, :settled], b], 2) for a, b in zip(held, new, strict=True))
        )
        step.cache.extra[name] = held, int(blocks.full.sum(1).min())  # a block is settled when every sample has it
    return held
