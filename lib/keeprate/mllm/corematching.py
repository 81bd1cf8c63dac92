"""CoreMatching: keep tokens that fire the same neurons as the prompt's last token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.budget import Budget
from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, check_layers
from keeprate.mllm.staged import at_depth
from keeprate.reduce import gather_tokens


@dataclass(frozen=True, repr=False)
class Knee(Budget):
    """As many tokens as score above the knee of the sorted scores: the point farthest from the chord of the curve.

    A curve without a knee, a straight line, keeps every token.

    Source: CoreMatching (2505.19235), maximum geometric distance.
    """

    def __post_init__(self):
        pass

    def __repr__(self) -> str:
        return "Knee()"

    @property
    def ragged(self) -> bool:
        return True

    def counts(self, scores: torch.Tensor, stage: int = 1, total: int | None = None) -> torch.Tensor:
        """Tokens above the knee, for every row of scores [..., n]; -inf marks tokens that do not exist."""
        curve = scores.float().sort(-1, descending=True).values
        there = ~curve.isneginf()
        n = there.sum(-1, keepdim=True)
        curve = curve.masked_fill(~there, 0.0)
        last = curve.gather(-1, n - 1)
        # the distance to the chord is this difference, times a factor that is the same for all points
        step = torch.arange(curve.shape[-1], device=curve.device)
        chord = curve[..., :1] + (last - curve[..., :1]) * step / (n - 1).clamp_min(1)
        away = (curve - chord).abs().masked_fill(~there, -1.0)
        far, knee = away.max(-1, keepdim=True)
        above = ((curve > curve.gather(-1, knee)) & there).sum(-1)
        flat = far[..., 0] <= 1e-5 * (curve[..., 0] - last[..., 0]).abs()
        return torch.where(flat, n[..., 0], above.clamp_min(1))


@register(kind="pruning", needs=("activations",))
@dataclass(frozen=True)
class CoreMatching(InsideMethod):
    """Score a token by the neurons of a feed-forward layer that it shares with the prompt's last token.

    G(x) = act(gate(x)) * up(x) in the layer before the cut, Gamma(x) = {neurons with G > 0}; the score is
    |Gamma(x_j) and Gamma(x_last)|. The released code does this with the fifth token from the end of LLaVA's prompt
    template. It also skips neurons while decoding, which changes no token and is left out; tokens are removed where it
    may also zero their keys and values.

    Args:
        keep: Knee() chooses by the curve of the scores, as in the paper; anything else fixes the number.
        layer: 0-based layer before which tokens are dropped; None = 10 of 32, scaled to the depth.

    Source: Wang et al. 2025 (2505.19235).
    """

    policy: ClassVar[str] = "keep"

    keep: float | int | Budget = Knee()
    layer: int | None = None

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return at_depth((10,), depth) if self.layer is None else check_layers((self.layer,), depth)

    def taps(self, depth: int) -> tuple[tuple[int, str], ...]:
        return ((self.layers_at(depth)[0] - 1, "mlp.down_proj"),)

    def score(self, t: Inside) -> torch.Tensor:
        active = t.taps[t.layer - 1, "mlp.down_proj"][0] > 0  # b m f
        last = gather_tokens(active, t.last[:, None])
        return (t.visual(active) & last).sum(-1).float()
