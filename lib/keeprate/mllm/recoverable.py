"""Recoverable Compression: what the class token passed over, the question brings back."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.anatomy import Multimodal
from keeprate.check import number, whole
from keeprate.method import register
from keeprate.mllm.base import Choice, Visual, best
from keeprate.mllm.scores import Adaptive, local_outliers
from keeprate.mllm.text import relevance
from keeprate.reduce import gather_tokens, join


@register(kind="merging", needs=("class attention", "keys", "CLIP text"))
@dataclass(frozen=True)
class RecoverableCompression(Adaptive):
    """Keep the tokens of highest class attention and those nearest the question; merge the others around a few centres.

    How many by attention, and how many by text, is the number of outliers among those scores by local outlier factor;
    how many centres, the number of outliers of attention among the tokens left over. A centre adds its most similar
    leftover tokens, one extra token is the sum of all that are no centre, both weighted by class attention, which is
    not renormalised. Attention and keys are those of the last block, whose heads are not split; sums are taken before
    the projector. The published code puts centres and extra token last; here they stand in raster order, the extra one
    at the token of highest attention among those it sums. Without a class token: the attention received.

    Args:
        keep: Tokens in all; None = as the outliers say. A given number is one extra token and, of the others, a third
            each by text and as centres, rounded down, and the rest by attention.
        neighbours: Of the local outlier factor.
        merge: Leftover tokens that a centre adds.
        text_weight: Weight of the text score, against the cosine of keys, in a centre's choice of tokens.
        clip: Name of the CLIP model that the vision encoder comes from, for `kr.load`; the questions are then passed as
            text. "" compares with the language model's embeddings of the words.

    Source: Chen et al. 2024 (2409.01179); numbers of the released code.
    """

    text_guided: ClassVar[bool] = True

    neighbours: int = 10
    merge: int = 32
    text_weight: float = 50.0
    clip: str = ""

    def __post_init__(self):
        super().__post_init__()
        whole("neighbours", self.neighbours)
        whole("merge", self.merge)
        number("text_weight", self.text_weight, 0)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return (-1,)

    def score(self, t: Visual) -> torch.Tensor:
        return t.one_head(-1)

    def choose(self, t: Visual, scores: torch.Tensor) -> Choice:
        there = torch.ones(t.x.shape[:2], dtype=torch.bool, device=t.x.device) if t.valid is None else t.valid
        said = relevance(t, self.clip)
        if self.keep is None:
            seen = best(scores, local_outliers(scores, there, self.neighbours), there)
            kept = seen | best(said, local_outliers(said, there, self.neighbours), there)
            centres = local_outliers(scores, there & ~kept, self.neighbours)
        else:
            count = self.count(t, scores)
            centres = (count - 1) // 3
            seen = best(scores, count - 1 - 2 * centres, there)
            kept = seen | best(said, centres, there & ~seen)
            kept = kept | (there & (count >= t.total)[:, None])  # an image that keeps everything beside others
        centre = best(scores, centres, there & ~kept)
        others = there & ~kept & ~centre
        extra = best(scores, others.any(1).long(), others)
        index = torch.arange(t.n, device=t.x.device)
        home = torch.where(kept | centre, index, extra.to(torch.uint8).argmax(1, keepdim=True))
        reduction = join(home.masked_fill(~there, -1), score=t.hide(scores))
        rep = reduction.rep
        is_centre, is_extra = centre.gather(1, rep), extra.gather(1, rep)
        keys = t.keys(-1)
        close = score.similarity(gather_tokens(keys, rep), keys) + self.text_weight * said[:, None]
        close, chosen = close.masked_fill(~others[:, None], float("-inf")).topk(min(self.merge, t.n))
        share = scores.float() * others
        weight = torch.zeros(*rep.shape, t.n, device=rep.device)
        weight = weight.scatter(2, chosen, share[:, None].expand_as(weight).gather(2, chosen) * close.isfinite())
        weight = torch.where(is_extra[..., None], share[:, None], weight * is_centre[..., None])
        features = t.features.float()
        sums = gather_tokens(features, rep) * ~is_extra[..., None] + weight @ features
        changed = (is_centre | is_extra)[..., None]
        values = t.project(sums.to(t.features.dtype)).to(t.x.dtype)
        return Choice(reduction, torch.where(changed, values, gather_tokens(t.x, rep)))
