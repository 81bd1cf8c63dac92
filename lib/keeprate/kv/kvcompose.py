"""KVCompose (2509.05165): every head keeps its own best tokens, lined up by rank, and layers share one budget."""

from dataclasses import dataclass

import torch

from keeprate import score
from keeprate.kv.base import EvictMethod, Step
from keeprate.method import register


@register(kind="eviction", needs=("received attention",))
@dataclass(frozen=True)
class KVCompose(EvictMethod):
    """Greatest attention a token receives while the prompt is read a second time; budgets by composite tokens.

    The r-th composite token of a layer is the r-th best token of every head; its score is the mean of theirs. The
    best composite tokens of all layers are kept, so all heads of a layer keep equally many and tensors stay
    rectangular; a layer without any keeps one, beyond the budget. The first layer's composite scores are the greatest
    of all layers at that rank, which protects it.

    Args:
        keep: See `EvictMethod`.
        reread: Read the prompt a second time, with all of it visible to every row; else the rows of the prefill vote,
            which see only what came before them.
        value_norm: Multiply by the norm of the token's value.
        smooth: Add the mean over the layer's KV heads to every head's score.

    Source: KVCompose (2509.05165), composite tokens and the budget over layers.
    """

    across_layers = True

    reread: bool = True
    value_norm: bool = False
    smooth: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.budget.ragged or self.budget.schedule is not None:
            raise ValueError(f"{self.name} divides one number of tokens among layers; got keep={self.keep!r}")

    @property
    def replays(self) -> bool:
        return self.reread

    def observe(self, step: Step) -> None:
        prompt = step.n - step.m
        step.cache.extra["votes"] = step.by_kv_head(step.received(reduce="max"))[..., :prompt]

    def score(self, step: Step) -> torch.Tensor:
        votes = step.cache.extra.pop("votes", None)
        if votes is None:
            votes = step.by_kv_head(step.received(reduce="max"))
        if self.value_norm:
            votes = votes * score.value_norm(step.view.v, per_head=True)
        return votes + step.shared(votes) if self.smooth else votes

    def across(self, steps: list[Step], scores: list[torch.Tensor]) -> list[torch.Tensor]:
        blank = [s if t.valid is None else s.masked_fill(~t.valid, -1.0) for s, t in zip(scores, steps, strict=True)]
        composite = torch.stack([s.sort(-1, descending=True).values.mean(1) for s in blank], 1)  # b layers n
        composite[:, 0] = composite.amax(1)
        b, layers, n = composite.shape
        # a rank beyond a sample's own tokens has nothing to keep
        lengths = steps[0].lengths
        composite = composite.masked_fill(torch.arange(n, device=lengths.device) >= lengths[:, None, None], -2.0)
        total = self.budget.each(lengths * layers) if self.budget.keep else self.target(steps[0])[:, 0] * layers
        rank = composite.flatten(1).argsort(dim=-1, descending=True, stable=True).argsort(-1).view(b, layers, n)
        counts = (rank < total[:, None, None]).sum(-1).clamp_min(1)  # b layers
        return [counts[:, i : i + 1].expand(-1, scores[i].shape[1]) for i in range(layers)]
