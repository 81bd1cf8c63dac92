"""TransPrune: keep tokens that the language model's blocks change most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from keeprate.method import register
from keeprate.mllm.base import Inside
from keeprate.mllm.staged import StagedMethod


@register(kind="pruning", needs=("activations", "attention rows"))
@dataclass(frozen=True)
class TransPrune(StagedMethod):
    """Score a token by how much attention and MLP turn and scale it, plus what the question's tokens look at.

    Transition of a block with normalised input u and output o, before the residual:
    (||o_n|| / ||u_n||) softmax_n(1 - cos(u_n, o_n)), softmax over the sequence; attention and MLP are added, and layers
    from the one before the first cut on add up. Guidance is the attention of the question's rows in the layer about to
    run, mean over heads and rows. Both are divided by their sums over the visual tokens. All this is the published
    code; the paper's equation 2 has 1 - |cos|.

    Args:
        keep: Shares left by each cut.
        layers: 0-based layers of the cuts; None = 7, 9 and 12 of 32, scaled to the depth.
        guidance: Weight of the second term, which is 1 in the paper; 0 = transition alone.

    Source: Li et al. 2025 (2507.20630) and its code.
    """

    text_guided: ClassVar[bool] = True
    where: ClassVar[tuple[int, ...]] = (7, 9, 12)

    keep: float | int | tuple = (0.875, 0.625, 0.125)
    guidance: float = 1.0

    def watched(self, depth: int) -> tuple[int, ...]:
        layers = self.layers_at(depth)
        return tuple(range(layers[0], layers[-1] + 1))

    def taps(self, depth: int) -> tuple[tuple[int, str], ...]:
        return tuple((layer - 1, name) for layer in self.watched(depth) for name in ("self_attn", "mlp"))

    def observe(self, t: Inside) -> None:
        total = t.carry("transition")
        for name in ("self_attn", "mlp"):
            total += transition(*t.taps[t.layer - 1, name], t.real)

    def score(self, t: Inside) -> torch.Tensor:
        scores = _share(t.visual(t.carry("transition")), t.valid)
        if self.guidance == 0:
            return scores
        weight = torch.ones(t.text_slot.shape, device=scores.device) if t.text_valid is None else t.text_valid.float()
        looks = t.columns(t.ahead(t.text_slot).received(weight[:, None])).mean(1)
        return scores + self.guidance * _share(looks, t.valid)


def transition(given: torch.Tensor, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How far a block moves each token: inputs and outputs [b, m, d], real [b, m] -> [b, m], zero where not real."""
    given, output = given.float(), output.float()
    turn = (1 - F.cosine_similarity(given, output, dim=-1)).masked_fill(~real, float("-inf")).softmax(-1)
    scale = output.norm(dim=-1) / given.norm(dim=-1).clamp_min(1e-12)
    return (scale * turn).masked_fill(~real, 0.0)


def _share(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """x [b, v] over its sum."""
    x = x if valid is None else x * valid
    return x / x.sum(1, keepdim=True).clamp_min(1e-12)
