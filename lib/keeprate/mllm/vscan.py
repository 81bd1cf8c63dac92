"""VScan: look at an image globally and window by window, merge the rest, and prune again in the language model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.anatomy import Multimodal
from keeprate.budget import Budget
from keeprate.check import fraction, whole
from keeprate.method import register
from keeprate.mllm.base import Inside, MLLMMethod, Visual, best, check_layers, dropped
from keeprate.mllm.visionzip import nearest
from keeprate.reduce import Reduction, join


@dataclass(frozen=True)
class TwoStages(MLLMMethod):
    """Base of methods that reduce before the language model and once more inside it.

    Args:
        keep: Share (or number) of tokens, mean over the decoder layers, from which both counts follow; or the two
            counts themselves, as shares of all tokens or numbers.
        layer: 0-based decoder layer of the second reduction; None = half the depth (16 of 32).
        second: Share of the first count that the second reduction leaves. Where the mean is so high that the first
            reduction would have to keep more than there is, it keeps all, and the second follows from the mean.
    """

    staged: ClassVar[bool] = True

    keep: float | int | tuple | Budget = 1 / 9
    layer: int | None = None
    second: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        fraction("second", self.second)
        budget = self.budget
        if budget.ragged or (budget.schedule is not None and len(budget.schedule) != 2):
            raise ValueError(f"{self.name} takes a share, a number or two of them; got keep={self.keep!r}")

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((max(1, depth // 2) if self.layer is None else self.layer,), depth)

    def shares(self, total: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that the two reductions would leave of `total` [b], not rounded where they follow from a mean."""
        budget = self.budget
        if budget.schedule is not None:
            first = budget.each(total)
            return first.double(), torch.minimum(budget.each(total, 2), first).double()
        mean = total.double() * budget.keep if budget.tokens is None else torch.full_like(total, budget.tokens).double()
        before = self.layers_at(depth)[0] / depth  # share of the layers that only the first reduction reaches
        first = torch.minimum(mean / (before + (1 - before) * self.second), total.double())
        return first, (mean - first * before) / (1 - before)

    def first_count(self, t: Visual) -> torch.Tensor:
        """[i] tokens that every image keeps before the language model."""
        first, _ = self.shares(t.total, t.parts.depth)
        return torch.minimum((first + 1e-6).long().clamp_min(1), t.total)

    def second_count(self, t: Inside) -> torch.Tensor:
        """[b] tokens that every sample keeps inside: of those present, the second count as a share of the first."""
        first, then = self.shares(t.total, t.depth)
        return torch.minimum((t.count * (then / first) + 0.5).long().clamp_min(1), t.count)

    def score(self, t: Inside) -> torch.Tensor:
        """[b, v] importance in the second reduction, higher = keep."""
        raise NotImplementedError(f"{self.name} does not say how it scores")

    def inside(self, t: Inside) -> Reduction | None:
        count = self.second_count(t)
        if bool((count >= t.count).all()):
            return None
        scores = self.score(t)
        return dropped(best(scores, count, t.valid), t.hide(scores))


@register(kind="merging", needs=("class attention", "features", "attention rows"))
@dataclass(frozen=True)
class VScan(TwoStages):
    """Half the tokens by window, half from anywhere; the others merge; later the question's last token chooses again.

    Before the language model, with T tokens to keep: in every window of a view the (T / 2) // windows tokens with most
    class attention in a shallow block (none where there are more windows than T / 2), then those with most class
    attention in the block that gives the features, up to T. Every other token joins the kept one with the highest
    cosine of projected embeddings, and a kept token becomes the mean of its group. Inside, the attention row of the
    prompt's last token chooses, computed with the projections of the layer about to run. Without a class token: the
    attention received, mean over query rows; the published code for such encoders takes windows of 4 and one greedy
    order with a cap on every window.

    Args:
        window: Side of a window, in tokens.
        shallow: 0-based block of the local scan; None = after a quarter of the blocks (5 of 24).

    Source: Zhang et al. 2025 (2505.22654) and its code; 96 tokens, then 32, of 576 are the default.
    """

    window: int = 6
    shallow: int | None = None

    def __post_init__(self):
        super().__post_init__()
        whole("window", self.window)
        if self.shallow is not None:
            whole("shallow", self.shallow, least=0)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        blocks = len(parts.tower_layers)
        shallow = max(0, blocks // 4 - 1) if self.shallow is None else self.shallow
        if shallow >= blocks:
            raise ValueError(f"shallow must lie in 0..{blocks - 1}, the blocks of the encoder; got {shallow}")
        return shallow, parts.feature

    def before(self, t: Visual) -> Reduction | None:
        count = self.first_count(t)
        if bool((count >= t.total).all()):
            return None
        local, wide = (t.importance(layer) for layer in self.tower_layers(t.parts))
        keep = local_global(local, wide, t.place, count, self.window, t.valid)
        return join(nearest(t.x, keep, t.valid), score=t.hide(wide))

    def score(self, t: Inside) -> torch.Tensor:
        return t.from_last(ahead=True).mean(1)


def local_global(
    local: torch.Tensor,
    wide: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
    window: int,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mask of `count` tokens: an equal quota from every window by one score, the others by another.

    Args:
        local: [i, n] score of the local scan, which gets half the count.
        wide: [i, n] score of the global scan.
        place: [i, n, 3] view, row and column of each token.
        count: [i] tokens.
        window: Side of the windows, which do not overlap.
        valid: [i, n] tokens that exist.

    Returns:
        bool [i, n].
    """
    n = local.shape[1]
    there = torch.ones_like(local, dtype=torch.bool) if valid is None else valid
    index = torch.arange(n, device=local.device).expand_as(local)
    rows, cols = (place[..., 1:].flatten(0, 1).amax(0) // window + 1).tolist()
    label = (place[..., 0] * rows + place[..., 1] // window) * cols + place[..., 2] // window
    label = label.clamp_min(0).masked_fill(~there, int(label.max()) + 1)
    # rank of every token in its window: sort by score, then by window, and count from where the window begins
    order = local.float().sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, label.gather(1, order).sort(dim=1, stable=True).indices)
    grouped = label.gather(1, order)
    begins = torch.ones_like(there)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    start = index.masked_fill(~begins, 0).cummax(1).values
    rank = torch.empty_like(index).scatter(1, order, index - start)
    windows = ((rank == 0) & there).sum(1)
    near = (rank < (count // 2 // windows)[:, None]) & there
    return near | best(wide.float().masked_fill(near, float("-inf")), count - near.sum(1), there & ~near)
