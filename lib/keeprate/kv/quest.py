"""Quest (2406.10774): bound what a page of keys can offer the query, and read the pages with the highest bounds."""

from dataclasses import dataclass

import torch

from keeprate.check import whole
from keeprate.kv.base import ReadMethod, Step
from keeprate.kv.blocks import Blocks, remembered
from keeprate.method import register
from keeprate.select import Kept, ragged_heads


@register(kind="read-time selection", needs=("keys",))
@dataclass(frozen=True)
class Quest(ReadMethod):
    """Every page of keys keeps its minimum m and maximum M per channel; u = sum_d max(q_d m_d, q_d M_d) >= any q . k.

    The pages of highest u are read, as many as the budget holds; the unfinished last page always is. Query heads that
    share a KV head read the same pages, by the greatest bound among them, so nothing is read twice.

    Args:
        keep: See `ReadMethod`.
        page: Tokens a page.
        skip: First layers that read everything.

    Source: Quest (2406.10774), upper bounds of pages from channel-wise minima and maxima.
    """

    page: int = 16
    skip: int = 2

    def __post_init__(self):
        super().__post_init__()
        whole("page", self.page)
        whole("skip", self.skip, 0)

    def bounds(self, step: Step, pages: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Channel-wise minimum and maximum of every full page, two tensors [b, g, pages, d]."""

        def compute(first: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys = pages.take(step.view.k, first)
            return keys.amin(3), keys.amax(3)

        return remembered(step, "pages", pages, compute)

    def choose(self, step: Step) -> Kept | None:
        target = self.target(step)
        if step.layer < self.skip or step.n <= int(target.min()):
            return None
        pages = Blocks.of(step, self.page)
        if not pages.full.shape[1]:
            return None
        low, high = self.bounds(step, pages)
        self.reads(step, low, high)
        q = step.view.q[:, :, 0].float().unflatten(1, (step.groups, -1))[..., None, :]  # b g r 1 d
        bound = torch.maximum(q * low.float()[:, :, None], q * high.float()[:, :, None]).sum(-1).amax(2)  # b g pages
        bound = bound.masked_fill(~pages.full[:, None], float("-inf"))
        room = ((target - pages.tail.sum(1, keepdim=True)) // self.page).clamp_min(1)
        best = bound.argsort(dim=-1, descending=True, stable=True).argsort(-1) < room[..., None]
        read = pages.tokens(best)
        return ragged_heads(read)
