"""ToDRE: tokens that differ most in sum, then none once words and image have stopped looking at each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.anatomy import Multimodal
from keeprate.check import choice, number
from keeprate.method import register
from keeprate.mllm.base import Inside, MLLMMethod, Visual, check_layers, dropped, first
from keeprate.reduce import Reduction, gather_tokens
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("features", "class attention", "received attention"))
@dataclass(frozen=True)
class ToDRE(MLLMMethod):
    """Before the language model: from a pivot on, add the token whose cosines with the chosen ones have the least sum.

    The pivot has the highest class attention in the last block of the vision encoder, in the overview where the image
    is cut into tiles. Inside, before one deep layer, two shares of the previous layer's attention are compared with
    tau, mean over heads: how much the question's rows pay to the image, and the image's rows to the question, which
    is nothing while the question stands behind the image. Where both are below, all visual tokens of the sample leave.
    Without a class token the paper draws the pivot at random; here it is the token that receives most attention.
    Position ids, of which the paper says nothing, are numbered anew at both stages. keep=1 leaves the model alone
    altogether.

    Args:
        keep: Share left by the first stage; the paper uses 0.1 and 0.25.
        tau: Attention below which image and question have parted; 0 = never.
        layer: 0-based first layer without visual tokens; None = at 7/8 of the depth.
        objective: "max_sum", the published version, or "max_min", the k-centre rule of the first preprint.

    Source: Li et al. 2025 (2505.18757), section 4, equations 3 to 7.
    """

    policy: ClassVar[str] = "compact"

    keep: float | int = 0.1
    tau: float = 0.1
    layer: int | None = None
    objective: str = "max_sum"

    def __post_init__(self):
        super().__post_init__()
        number("tau", self.tau, 0, 1)
        choice("objective", self.objective, ("max_sum", "max_min"))

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (-1,)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return check_layers((max(1, depth * 7 // 8) if self.layer is None else self.layer,), depth)

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        overview = t.place[..., 0] == 0
        overview = overview | ~overview.any(1, keepdim=True)
        pivot = t.hide(t.importance(-1)).masked_fill(~overview, float("-inf")).argmax(1)
        order, _ = farthest_point(t.x, int(count.max()), objective=self.objective, start=pivot, valid=t.valid)
        return dropped(first(order, count, t.n))

    def inside(self, t: Inside) -> torch.Tensor | None:
        if self.budget.keep == 1 or not t.text_slot.shape[1]:
            return None
        words, there = t.text_weight(), t.visual_weight()
        asked = words.sum((1, 2))
        to_image = t.from_text().mean(1) * gather_tokens(there[:, 0], t.slot)
        to_words = t.attention.received(there)[..., -words.shape[2] :].mean(1) * words[:, 0] / there.sum(2)
        parted = (to_image.sum(1) < self.tau) & (to_words.sum(1) < self.tau) & (asked > 0)
        if not bool(parted.any()):
            return None
        present = torch.ones_like(t.slot, dtype=torch.bool) if t.valid is None else t.valid
        return present & ~parted[:, None]
