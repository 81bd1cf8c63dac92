"""FiCoCo: in every layer, merge the most redundant tokens into those they correlate with."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import Inside, InsideMethod, best
from keeprate.mllm.staged import at_depth
from keeprate.reduce import Reduction, flat_positions, gather_tokens
from keeprate.select import ragged


@dataclass(frozen=True)
class Spread(Reduction):
    """A reduction in which a token may join several slots, a part of it each. The slot of the largest part is `slot`.

    Attributes:
        targets: [b, n, k] slots that a token joins.
        parts: [b, n, k] sizes it adds to them; of a token that stands for a slot, all zero.
    """

    targets: torch.Tensor | None = None
    parts: torch.Tensor | None = None

    def sizes(self) -> torch.Tensor:
        """[b, m] size of every slot: what its representative had, and what joined."""
        own = self.weight.gather(1, self.rep)
        return own.scatter_add(1, self.targets.flatten(1), self.parts.flatten(1))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Weighted means of the slots: [b, n, d] -> [b, m, d]."""
        base = gather_tokens(x, self.rep).float()
        target = self.targets.flatten(1)  # b n*k
        extra = self.parts.flatten(1) / self.sizes().gather(1, target)
        part = x.float().repeat_interleave(self.targets.shape[2], 1) - gather_tokens(base, target)
        y = base.flatten(0, 1).index_add(0, flat_positions(target, self.m), (extra[..., None] * part).flatten(0, 1))
        return y.view(base.shape).to(x.dtype)


@register(kind="merging", needs=("attention matrix",))
@dataclass(frozen=True)
class FiCoCo(InsideMethod):
    """FiCoCo-L: filter, correlate and compress between attention and MLP of every layer from one on.

    With A the layer's attention, mean over heads, i and j visual tokens, t the question's, s sizes:

        filter     R_i = beta sum_j A[i, j] - (1 - beta) mean_t A[t, i]: the highest are merged away
        correlate  C[i, j] = phi A[i, j] + (1 - phi) sum_t A[t, i] A[t, j]
        compress   x_j <- (s_j x_j + sum_i w[i, j] s_i x_i) / (s_j + sum_i w[i, j] s_i)

    where w[i] is the softmax of C[i] over the kept tokens above its `epsilon` quantile. The paper has A[i, t] A[t, j]
    in C; behind a causal mask no visual token sees the text that sees it, so that product is zero and the text's
    attention to both tokens takes its place. The released code takes A[i, t] in the filter as well, so that its second
    term is zero, and leaves out the division.

    The number of tokens falls evenly from layer to layer. The variants inside the vision encoder (V, VL) are left out.

    Args:
        keep: What the last layer leaves; 14 tokens merged a layer, as published, leave 198 of 576.
        layer: 0-based first layer; None = 5 of 32, scaled to the depth.
        beta: Weight of the visual term in the filter.
        phi: Weight of the visual term in the correlation.
        epsilon: Quantile of a row above which a token is a target; at least one is.

    Source: Han et al. 2024 (2411.17686) and its code.
    """

    text_guided: ClassVar[bool] = True
    middle: ClassVar[bool] = True

    layer: int | None = None
    beta: float = 0.6
    phi: float = 0.6
    epsilon: float = 0.998

    def __post_init__(self):
        super().__post_init__()
        if self.layer is not None:
            whole("layer", self.layer, 0)
        for name in ("beta", "phi", "epsilon"):
            number(name, getattr(self, name), 0, 1)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        first = at_depth((5,), depth)[0] if self.layer is None else self.layer
        if first >= depth:
            raise ValueError(f"layer must lie in 0..{depth - 1}; got {first}")
        return tuple(range(first, depth))

    def count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        end = self.budget.each(t.total)
        return t.total - (t.total - end) * t.stage // len(self.layers_at(t.depth))

    def score(self, t: Inside) -> torch.Tensor:
        """Minus the redundancy; keeps the attention for `choose`."""
        t.common["among"] = among = t.columns(t.attention.rows(t.slot)).mean(1)  # b v v
        among = among if t.valid is None else among * t.valid[:, None]
        return (1 - self.beta) * t.from_text().mean(1) - self.beta * among.sum(-1)

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction:
        keep = best(scores, self.count(t, scores), t.valid)
        text = t.columns(t.attention.rows(t.text_slot)).mean(1)  # b t v
        text = text if t.text_valid is None else text * t.text_valid[..., None]
        correlation = self.phi * t.common.pop("among") + (1 - self.phi) * text.transpose(1, 2) @ text
        size = t.carry("size")  # of what has been merged into a token
        # who joins whom is a decision: no gradient goes through attention rows that serve nothing else
        joins = compress(correlation.detach(), keep, t.count, t.visual(size) + 1, self.epsilon, t.valid)
        size.scatter_(1, t.slot.gather(1, joins.rep), joins.sizes() - 1)
        return joins


def compress(
    correlation: torch.Tensor,
    keep: torch.Tensor,
    n: torch.Tensor,
    size: torch.Tensor,
    epsilon: float,
    valid: torch.Tensor | None = None,
) -> Spread:
    """Merge every token that is not kept into the kept ones it correlates with.

    Args:
        correlation: [b, v, v], row = the token that goes.
        keep: [b, v] tokens that stay.
        n: [b] tokens there are.
        size: [b, v] what each of them stands for.
        epsilon: Quantile above which a token is a target.
        valid: [b, v] tokens that exist.
    """
    kept = ragged(keep)
    many = torch.minimum(n - 1 - (epsilon * (n - 1) + 1e-6).long(), keep.sum(1)).clamp_min(1)  # entries above it
    index = kept.index[:, None].expand(-1, keep.shape[1], -1)
    row = correlation.float().gather(2, index)  # b v m
    row = row if kept.valid is None else row.masked_fill(~kept.valid[:, None], float("-inf"))
    value, target = row.sort(dim=-1, descending=True, stable=True)
    most = int(many.max())
    value, target = value[..., :most], target[..., :most]
    value = value.masked_fill(torch.arange(most, device=keep.device) >= many[:, None, None], float("-inf"))
    goes = ~keep if valid is None else ~keep & valid
    parts = torch.where(goes[..., None], value.softmax(-1) * size[..., None], 0.0)
    slot = torch.where(keep, keep.long().cumsum(1) - 1, target[..., 0])
    slot = slot if valid is None else slot.masked_fill(~valid, -1)
    return Spread(kept.index, slot, weight=size, valid=kept.valid, targets=target, parts=parts)
