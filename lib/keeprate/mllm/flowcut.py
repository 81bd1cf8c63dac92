"""FlowCut: prune inside the vision encoder, step by step, by scores that add up from block to block."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from keeprate import score, select
from keeprate.anatomy import Multimodal
from keeprate.attention import AttentionView
from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, Visual, best, dropped
from keeprate.mllm.encoder import Encoder, around
from keeprate.reduce import Reduction, gather_tokens


@register(kind="pruning", needs=("class attention", "values"))
@dataclass(frozen=True)
class FlowCut(MLLMMethod):
    """Drop patches inside the encoder, more where class attention is concentrated.

    In every block a patch gets (r + s) ||v||_1: r = class attention, mean over heads; s = softmax(v_cls v), mean over
    heads; both with sum 1 over the patches; v = its value, mean over heads. The running score is S <- (1 - momentum) S
    + momentum * score. Counted back from the block before the one that gives the features, after every `every`-th block
    with m blocks to go, round((N - target) / sqrt(m) (1 - (H / log N)^2)) of N patches leave, H the entropy of r; at
    m = 0 the target is left, so that the block that gives the features runs on the target. The published code takes
    the largest such number in a batch, here each image has its own. Without a class token, as published for such
    encoders, the score is attention received times ||v||_1.

    The encoder gets cheaper. Behind it stands no second stage (the paper has one for images cut into views), and
    `trace.seconds` does not contain the selection.

    Args:
        momentum: Weight of the latest block in the running score.
        every: Blocks between two reductions.

    Source: Tong et al. 2025 (2505.19536) and its code.
    """

    supports: ClassVar[tuple[str, ...]] = ("llava",)  # patches are tokens, and the language model gets all of them

    momentum: float = 0.5
    every: int = 2

    def __post_init__(self):
        super().__post_init__()
        number("momentum", self.momentum, 0, 1)
        whole("every", self.every)
        if self.budget.ragged:
            raise ValueError(f"{self.name} needs a number of tokens known in advance; got keep={self.keep!r}")

    def encoder(self, parts: Multimodal) -> Encoder:
        return PruningEncoder(parts, self)

    def before(self, t: Visual) -> Reduction | None:
        if bool((self.budget.each(t.total) >= t.total).all()):
            return None
        if not isinstance(t.encoder, PruningEncoder) or t.encoder.alive is None:
            raise ValueError("FlowCut prunes inside the vision encoder: encode the images inside its `with` block")
        kept = torch.zeros_like(t.encoder.scores).scatter_add(1, t.encoder.alive, t.encoder.real().float())
        state = torch.stack([kept, t.encoder.scores], -1)  # images patches 2
        kept, scores = t.pad(t.encoder.tokens(state)).unbind(-1)
        return dropped(kept > 0, t.hide(scores))


class PruningEncoder(Encoder):
    """Runs the blocks of the encoder on the patches that are left.

    Every block gets and returns the full length, so that the model around it notices nothing; what was dropped is zero.

    Attributes:
        alive: [images, m] patches that are left; None before the first reduction.
        valid: [images, m] False = padding of an image that has fewer; None = none has.
        scores: [images, n] latest running score of every patch.
    """

    def __init__(self, parts: Multimodal, method: FlowCut):
        self.method = method
        self.last = max(0, parts.feature - 1)  # block after which the target is reached
        super().__init__(parts, tuple(range(self.last + 1)))

    def clear(self) -> None:
        super().clear()
        self.alive: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.view: AttentionView | None = None

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(super().attach(model))
            for i, block in enumerate(self.parts.tower_layers):
                stack.enter_context(around(block, "forward", functools.partial(self._block, i)))
            yield

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        self.view = view

    def real(self) -> torch.Tensor:
        """[images, m] which entries of `alive` exist."""
        return torch.ones_like(self.alive, dtype=torch.bool) if self.valid is None else self.valid

    def _block(self, number: int, forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        prefix = self.parts.prefix
        n = x.shape[1] - prefix
        target = self.method.budget.of_length(n)
        if target >= n or not self._encoding:
            return forward(x, *args, **kwargs)
        place, y = None, x
        if self.alive is not None:
            place = torch.arange(prefix, device=x.device).expand(len(x), -1)
            place = torch.cat([place, self.alive + prefix], 1)
            y = gather_tokens(x, place)
            args, kwargs = self._hide(y, args, kwargs)
        y = forward(y, *args, **kwargs)
        if number <= self.last:
            self._score()
            if (self.last - number) % self.method.every == 0:
                self._prune(target, self.last - number)
            self.view = None
        return y if place is None else torch.zeros_like(x).scatter(1, place[..., None].expand_as(y), y)

    def _hide(self, x: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments of a block with padding hidden from attention."""
        if self.valid is None:
            return args, kwargs
        there = nn.functional.pad(self.valid, (self.parts.prefix, 0), value=True)[:, None, None]
        mask = torch.zeros(there.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~there, torch.finfo(x.dtype).min)
        return ((mask, *args[1:]), kwargs) if args else (args, kwargs | {"attention_mask": mask})

    def _score(self) -> None:
        """Let the running scores take in the block that has just attended."""
        flow, self.relation = information_flow(self.view, self.parts.prefix, self.valid)
        if self.scores is None:
            self.scores = flow
            return
        if self.alive is not None:
            old = self.scores.gather(1, self.alive)
            flow = torch.lerp(old, flow, self.method.momentum)
            # padding repeats patches that were dropped: they keep the score they had
            flow = torch.where(self.real(), flow, old)
            self.scores = self.scores.scatter(1, self.alive, flow)
        else:
            self.scores = torch.lerp(self.scores, flow, self.method.momentum)

    def _prune(self, target: int, left: int) -> None:
        """Drop patches, `left` blocks before the target must be reached."""
        if self.alive is None:
            self.alive = torch.arange(self.scores.shape[1], device=self.scores.device).expand_as(self.scores)
        count = self.real().sum(1)
        rest = torch.full_like(count, target)
        if left:
            spread = torch.special.entr(self.relation).sum(1) / count.clamp_min(2).log()
            gone = ((count - target) / left**0.5 * (1 - spread.square())).round().long()
            rest = torch.maximum(count - gone, rest)
        kept = select.ragged(best(self.scores.gather(1, self.alive), rest, self.valid))
        self.alive, self.valid = self.alive.gather(1, kept.index), kept.valid


def information_flow(
    view: AttentionView, prefix: int, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlowCut's score of every patch in one block, and the attention to it with sum 1.

    Args:
        view: The block's attention; token 0 is the class token where prefix > 0.
        prefix: Tokens in front of the patches.
        valid: [b, n] False = padding.

    Returns:
        Two tensors [b, n]; padding gets 0.
    """
    v = view.v.float()
    size = v.mean(1).abs().sum(-1)[:, prefix:]
    if prefix:
        relation = score.attention_from(view, 0, prefix).mean(1)
        near = (v[:, :, :1] @ v.transpose(-1, -2))[:, :, 0]  # b h prefix + n
        if valid is not None:
            near = near.masked_fill(~nn.functional.pad(valid, (prefix, 0), value=True)[:, None], float("-inf"))
        semantic = near.softmax(-1)[..., prefix:].mean(1)
    else:
        relation, semantic = score.attention_received(view, 0, valid).mean(1), torch.zeros_like(size)
    if valid is not None:
        relation = relation.masked_fill(~valid, 0.0)
    relation, semantic = (x / x.sum(-1, keepdim=True).clamp_min(1e-12) for x in (relation, semantic))
    return (relation + semantic) * size, relation
