"""ZOO-Prune: tokens far apart that the projector is sensitive to."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual, dropped, first
from keeprate.mllm.scores import unit_range
from keeprate_kernels import farthest_point

CHUNK = {"cpu": 1 << 20}  # numbers projected at once: what fits a processor's cache halves the time there


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class ZOOPrune(BeforeMethod):
    """Greedy choice of the token with the highest sensitivity times distance to the nearest chosen token.

    Sensitivity is how far the projector's output moves along random directions u of its input,
    s[n] = mean_j ||g(F_n + h u_j) - g(F_n - h u_j)|| / 2h, stretched to 0..1 within the image; distance is 1 - cosine
    of the projected tokens. All tokens share the directions, and so do all calls with one seed.

    Args:
        m: Random directions, of length 1.
        h: Step along a direction. Differences this small need fp32, whatever the model's dtype.

    Source: Kim et al. 2025 (2509.24837); parameters of the released code.
    """

    m: int = 64
    h: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        whole("m", self.m)
        number("h", self.h, 1e-6)

    def score(self, t: Visual) -> torch.Tensor:
        features = t.features.float()
        chance = torch.Generator().manual_seed(t.generator.initial_seed())  # the same image, the same answer
        directions = F.normalize(torch.randn(self.m, features.shape[-1], generator=chance), dim=-1)
        return sensitivity(_exact(t), features, directions.to(features.device), self.h)

    def choose(self, t: Visual, scores: torch.Tensor) -> torch.Tensor:
        count, weight = self.budget.each(t.total), unit_range(scores, t.valid)
        order, _ = farthest_point(t.x, int(count.max()), start="weight", weight=weight, valid=t.valid)
        return dropped(first(order, count, t.n), t.hide(scores))


@torch.no_grad()
def sensitivity(
    project: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, directions: torch.Tensor, h: float
) -> torch.Tensor:
    """Mean length of the projector's central differences: features [i, n, c], directions [m, c] -> [i, n]."""
    total = torch.zeros(features.shape[:2], device=features.device)
    for some in directions.split(max(1, CHUNK.get(features.device.type, 1 << 24) // features.numel())):
        step = h * some[:, None, None]
        total += torch.linalg.vector_norm(project(features + step) - project(features - step), dim=-1).sum(0)
    return total / (2 * h * len(directions))


def _exact(t: Visual) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's projector in fp32."""
    module = t.parts.projector
    if all(p.dtype == torch.float32 for p in module.parameters()):
        return t.project
    weights = {name: p.float() for name, p in module.state_dict().items()}
    encoder = copy.copy(t.encoder)
    encoder.parts = replace(t.parts, projector=lambda x: torch.func.functional_call(module, weights, (x,)))
    return encoder.project
