"""VScan: look at an image globally and window by window, merge the rest, and prune again in the language model."""

from dataclasses import dataclass

import torch

from keeprate.anatomy import Multimodal
from keeprate.check import whole
from keeprate.method import register
from keeprate.mllm.base import Inside, Visual, best
from keeprate.mllm.staged import TwoStages
from keeprate.mllm.visionzip import nearest
from keeprate.reduce import Reduction, join


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
