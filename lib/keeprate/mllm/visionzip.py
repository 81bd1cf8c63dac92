"""VisionZip: keep what the class token looks at, and merge the rest into a few tokens of context."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keeprate.anatomy import Multimodal
from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import BeforeMethod, Choice, Visual, best
from keeprate.mllm.encoder import Encoder
from keeprate.reduce import flat_positions, gather_tokens, join
from keeprate.score import similarity
from keeprate.select import positions


@register(kind="merging", needs=("class attention", "keys", "features"))
@dataclass(frozen=True)
class VisionZip(BeforeMethod):
    """Dominant tokens by class attention, contextual ones at a regular stride among the others, which merge into those.

    Scores and keys are those of the block that gives the features. Of what is not dominant, in raster order, every
    (M // c)-th token, c in all, is a target; each other one joins the target with the most similar key (cosine, mean
    over heads), and a target becomes its own features plus the mean of those that joined, before the projector. Where
    the projector takes the features of the class token (CLIP), that token is one of the dominant ones and stands at
    the first patch that is neither dominant nor target; with several views it is that of the whole image. Without a
    class token: the attention received, mean over query rows.

    Args:
        keep: All tokens together, the class token included.
        contextual: Share of them that is contextual, in [0, 1); one other token stays at least.

    Source: Yang et al. 2024 (2412.04467) and its code, 54 + 10 tokens; there contextual tokens stand last.
    """

    contextual: float = 10 / 64

    def __post_init__(self):
        super().__post_init__()
        number("contextual", self.contextual, 0, 0.99)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (parts.feature,)

    def encoder(self, parts: Multimodal) -> Encoder:
        return ClassEncoder(parts, self.tower_layers(parts))

    def score(self, t: Visual) -> torch.Tensor:
        return t.importance(t.parts.feature)

    def choose(self, t: Visual, scores: torch.Tensor) -> Choice:
        there = torch.ones_like(scores, dtype=torch.bool) if t.valid is None else t.valid
        count, summary = self.count(t, scores), class_features(t)
        whole = count >= t.total  # an image that keeps everything beside others that do not
        context = torch.minimum((count * self.contextual + 0.5).long(), count - 1).masked_fill(whole, 0)
        extra = torch.zeros_like(whole) if summary is None else ~whole
        dominant = best(scores, count - context - extra.long(), t.valid)
        rest = there & ~dominant
        target = strided(rest, context)
        home = nearest(t.keys(t.parts.feature, mean=True), target, t.valid)
        home = torch.where(dominant, torch.arange(t.n, device=home.device), home)
        x, changed = add_mean(t.features.float(), home, rest & ~target), target
        if summary is not None:
            host = rest & ~target & extra[:, None]
            host = host & (host.long().cumsum(1) == 1)
            home = torch.where(host, torch.arange(t.n, device=home.device), home)
            x, changed = torch.where(host[..., None], summary.float()[:, None], x), target | host
        reduction = join(home, score=t.hide(scores))
        made = t.project(gather_tokens(x, reduction.rep).to(t.features.dtype))
        changed = changed.gather(1, reduction.rep)[..., None]
        return Choice(reduction, torch.where(changed, made, gather_tokens(t.x, reduction.rep)))


class ClassEncoder(Encoder):
    """Also keeps the class token of the block that gives the features: `class_token` [views, 1, c]."""

    def clear(self) -> None:
        super().clear()
        self.class_token: torch.Tensor | None = None

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        hook = self.parts.tower_layers[self.parts.feature].register_forward_hook(self._keep)
        try:
            with super().attach(model):
                yield
        finally:
            hook.remove()

    def _keep(self, block: nn.Module, args: tuple, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self.class_token = x[:, :1] if self.parts.has_cls else None


def class_features(t: Visual) -> torch.Tensor | None:
    """[i, c] features of every image's class token; None where the projector takes no single patch's features."""
    token = getattr(t.encoder, "class_token", None)
    if token is None or token.shape[-1] != t.features.shape[-1]:
        return None
    patches = t.encoder.views[t.parts.feature][0].q.shape[2] - t.parts.prefix
    tokens = t.pad(t.encoder.tokens(token.expand(-1, patches, -1)))  # i n c: each patch has that of its view
    first = (t.place[..., 0] == 0).to(torch.uint8).argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), first]


def strided(among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mask of every (m // count)-th of the m tokens of a mask [i, n], `count` [i] of them."""
    rank = among.long().cumsum(1) - 1
    step = (among.sum(1) // count.clamp_min(1)).clamp_min(1)[:, None]
    return among & (rank % step == 0) & (rank // step < count[:, None])


def nearest(metric: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """For every token the most similar target, the first of equals, itself where it is one.

    Args:
        metric: [i, n, c] features, compared by cosine.
        targets: [i, n] bool; a row may hold none.
        valid: [i, n] tokens that exist.

    Returns:
        [i, n] positions, -1 = padding, or a row without targets: `reduce.join` takes them.
    """
    index, real = positions(targets, 1)  # i t
    near = similarity(metric, gather_tokens(metric, index)).masked_fill(~real[:, None], float("-inf"))
    # the earliest of equals, which rounding makes unequal: an overview and its only tile hold the same patches twice
    near = (near >= near.amax(-1, keepdim=True) - 1e-6).to(torch.uint8).argmax(-1)
    home = torch.where(targets, torch.arange(targets.shape[1], device=near.device), index.gather(1, near))
    there = real[:, :1] if valid is None else real[:, :1] & valid
    return home.masked_fill(~there, -1)


def add_mean(x: torch.Tensor, home: torch.Tensor, joins: torch.Tensor) -> torch.Tensor:
    """Add to every token the mean of those that join it: x [i, n, c], home [i, n] positions, joins [i, n] bool."""
    joins = joins & (home >= 0)
    to = flat_positions(home.clamp_min(0), x.shape[1])
    total = torch.zeros_like(x).flatten(0, 1).index_add(0, to, (x * joins[..., None]).flatten(0, 1))
    mass = torch.zeros_like(joins, dtype=x.dtype).scatter_add(1, home.clamp_min(0), joins.to(x.dtype))
    return x + total.view(x.shape) / mass.clamp_min(1)[..., None]
