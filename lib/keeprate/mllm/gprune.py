"""G-Prune: importance that walks along the edges between similar tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Visual, best, dropped
from keeprate.reduce import Reduction


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class GPrune(BeforeMethod):
    """Let the norm of every token spread over a graph of similar tokens for a few steps, then divide by the degree.

    s = (w P^m) / D with w the norms, P the softmax over a token's edges of cosine / tau, and D the number of its edges:
    all tokens with a cosine of at least t. The overview of a tiled image and its tiles are graphs of their own, each
    keeping the same share. The released code keeps all tokens that end a line; here they leave with the lines.

    Args:
        keep: Share of tokens kept; that of the released script.
        t: Least cosine of an edge.
        tau: Temperature.
        m: Steps.

    Source: Jiang et al. 2025 (2501.02268); parameters and position ids of the released code.
    """

    policy: ClassVar[str] = "keep"

    keep: float | int = 0.5
    t: float = 0.5
    tau: float = 0.03
    m: int = 5

    def __post_init__(self):
        super().__post_init__()
        number("t", self.t, -1, 1)
        number("tau", self.tau, 1e-6)
        whole("m", self.m, 0)

    def score(self, t: Visual) -> torch.Tensor:
        return walk(t.x, _overview(t), t.valid, self.t, self.tau, self.m)

    def choose(self, t: Visual, scores: torch.Tensor) -> Reduction:
        count, overview = self.count(t, scores), _overview(t)
        there = torch.ones_like(overview) if t.valid is None else t.valid
        share = count * (overview & there).sum(1) // t.total
        keep = best(scores, share, overview & there) | best(scores, count - share, ~overview & there)
        return dropped(keep, t.hide(scores))


def _overview(t: Visual) -> torch.Tensor:
    """[i, n] tokens of the view that shows the whole image."""
    return t.place[..., 0] == 0


def walk(
    x: torch.Tensor, group: torch.Tensor, valid: torch.Tensor | None, t: float, tau: float, m: int
) -> torch.Tensor:
    """Norms after m steps on the graph of similar tokens, over the degree.

    Args:
        x: [i, n, d].
        group: [i, n] edges join tokens of one group only.
        valid: [i, n] False = padding, without edges and mass.
        t, tau, m: Least cosine of an edge, temperature, steps.

    Returns:
        [i, n].
    """
    cosine = score.similarity(x)
    edge = (cosine >= t) & (group[:, :, None] == group[:, None])
    mass = torch.linalg.vector_norm(x.float(), dim=-1)
    if valid is not None:
        edge, mass = edge & valid[:, None], mass * valid
    edge = edge | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    step = (cosine / tau).masked_fill(~edge, float("-inf")).softmax(-1)
    degree = edge.sum(2)  # of those that go out, for padding must not count
    mass = mass[:, None]
    for _ in range(m):
        mass = mass @ step
    return mass[:, 0] / degree
