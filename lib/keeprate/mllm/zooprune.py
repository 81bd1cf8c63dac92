"""ZOO-Prune: tokens far apart that the projector is sensitive to."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual, dropped, first
from keeprate.mllm.scores import unit_range
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point

CHUNK = {"cpu": 1 << 20}  # numbers projected at once: what fits a processor's cache halves the time there


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class ZOOPrune(BeforeMethod):
    """Greedy choice of the token with the highest sensitivity times distance to the nearest chosen token.

    Sensitivity is how far the projector's output moves along random directions u of its input,
    s[n] = mean_j ||g(F_n + h u_j) - g(F_n - h u_j)|| / 2h, stretched to 0..1 within the image; distance is 1 - cosine
    of the projected tokens. All tokens share the directions, and so do all calls with one seed.

    The cost is that of sending 2 m copies of all n tokens through the projector, whatever is kept. Where it is a linear
    layer c -> e, an activation and a linear layer e -> d (LLaVA, LLaVA-NeXT, LLaVA-OneVision), the first takes one
    product for the tokens and one for the directions, the second one for every direction: n c e + m c e + m n e d
    multiplications instead of 2 m n (c e + e d), which for LLaVA-1.5 is 2.5 times fewer.

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
        directions = directions.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            project = _exact(t)
            layers = two_layers(t.parts.projector, project, features)
            if layers is None:
                return sensitivity(project, features, directions, self.h)
            return layered_sensitivity(*layers, features, directions, self.h)

    def choose(self, t: Visual, scores: torch.Tensor) -> Reduction:
        count, weight = self.budget.each(t.total), unit_range(scores, t.valid)
        order, _ = farthest_point(t.x, int(count.max()), start="weight", weight=weight, valid=t.valid)
        return dropped(first(order, count, t.n), t.hide(scores))


@torch.no_grad()
def sensitivity(
    project: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, directions: torch.Tensor, h: float
) -> torch.Tensor:
    """Mean length of the projector's central differences: features [i, n, c], directions [m, c] -> [i, n]."""
    total = torch.zeros(features.shape[:2], device=features.device)
    for some in directions.split(max(1, _chunk(features) // features.numel())):
        step = h * some[:, None, None]
        total += torch.linalg.vector_norm(project(features + step) - project(features - step), dim=-1).sum(0)
    return total / (2 * h * len(directions))


@torch.no_grad()
def layered_sensitivity(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    act: Callable[[torch.Tensor], torch.Tensor],
    outer: torch.Tensor,
    features: torch.Tensor,
    directions: torch.Tensor,
    h: float,
) -> torch.Tensor:
    """`sensitivity` of the projector outer act(weight x + bias) + constant, up to rounding.

    With a = weight F + bias and b = h weight u its differences are outer (act(a + b) - act(a - b)).

    Args:
        weight: [e, c].
        bias: [e]; None = 0.
        act: Acts on every number alone.
        outer: [d, e].
        features: [i, n, c].
        directions: [m, c].
        h: Step along a direction.

    Returns:
        [i, n].
    """
    rows, steps = features.flatten(0, 1), h * (directions @ weight.mT)
    width, found = max(outer.shape), []
    limit = _chunk(features) // 4  # of both sides, their difference and its product together
    for block in rows.split(max(1, limit // width)):
        middle, total = F.linear(block, weight, bias), block.new_zeros(len(block))
        for step in steps.split(max(1, limit // (len(block) * width))):
            gap = act(middle + step[:, None]).sub_(act(middle - step[:, None]))  # m n e
            total += torch.linalg.vector_norm(gap @ outer.mT, dim=-1).sum(0)
        found.append(total)
    return torch.cat(found).view(features.shape[:2]) / (2 * h * len(directions))


@torch.no_grad()
def two_layers(
    module: nn.Module, project: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, nn.Module, torch.Tensor] | None:
    """What a projector of two linear layers with an activation between them is made of, for `layered_sensitivity`.

    Args:
        module: The projector.
        project: What it does, in fp32.
        features: [i, n, c] on some of which both must agree.

    Returns:
        Weight and bias of the first layer, activation, weight of the second, in fp32; None for any other projector.
    """
    leaves = [part for part in module.modules() if next(part.children(), None) is None]
    if [type(leaf) is nn.Linear for leaf in leaves] != [True, False, True]:
        return None
    if len([*leaves[1].parameters()]) or any(p.device != features.device for p in module.parameters()):
        return None
    inner, act, outer = leaves
    weight, bias = inner.weight.float(), None if inner.bias is None else inner.bias.float()
    some = features[:, :16]
    middle = F.linear(some, weight, bias)
    out = act(middle)
    if out.shape != middle.shape or out.shape[-1] != outer.in_features:
        return None
    # numbers put in other places, and beside others, must give what they gave
    other = torch.arange(out.numel(), device=out.device).view(out.shape) % 3 == 0
    mixed = torch.where(other, middle.roll((1, 1), (1, 2)), middle)
    alone = torch.allclose(act(mixed), torch.where(other, out.roll((1, 1), (1, 2)), out), atol=1e-6)
    ours, true = F.linear(out, outer.weight.float(), None if outer.bias is None else outer.bias.float()), project(some)
    alike = ours.shape == true.shape and bool((ours - true).abs().amax() <= 1e-5 * true.abs().amax())
    return (weight, bias, act, outer.weight.float()) if alone and alike else None


def _chunk(features: torch.Tensor) -> int:
    """Numbers projected at once on the features' device."""
    return CHUNK.get(features.device.type, 1 << 24)


def _exact(t: Visual) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's projector in fp32."""
    module = t.parts.projector
    if all(p.dtype == torch.float32 for p in module.parameters()):
        return t.project
    weights = {name: p.float() for name, p in module.state_dict().items()}
    encoder = copy.copy(t.encoder)
    encoder.parts = replace(t.parts, projector=lambda x: torch.func.functional_call(module, weights, (x,)))
    return encoder.project
