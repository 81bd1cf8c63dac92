"""TRIM: patches by CLIP's similarity to the question, and the mean of the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate.check import choice
from keeprate.method import register
from keeprate.mllm.base import Choice, Visual, best
from keeprate.mllm.scores import Adaptive, above_fence
from keeprate.mllm.text import SIGNS, relevance
from keeprate.reduce import gather_tokens, join


@register(kind="merging", needs=("features", "CLIP text"))
@dataclass(frozen=True)
class TRIM(Adaptive):
    """Keep the patches whose similarity to the question stands out; the mean of all others is one more token.

    Scores are the softmax over the patches of the signed similarity. The mean is taken before the projector. The
    published code puts it last; here it stands at the best of the tokens it replaces.

    Args:
        keep: Tokens in all, the mean included; None = those above the third quartile by 1.5 interquartile ranges, and
            the mean.
        clip: Name of the CLIP model that the vision encoder comes from, for `kr.load`; the questions are then passed as
            text. "" compares with the language model's embeddings of the words.
        sign: -1 keeps the patches least similar to the question, as the released code does: the patch maps of OpenAI's
            CLIP are inverted. None = -1 with `clip`; 1 without, and with an embedded model, which has no such fault.

    Source: Song et al. 2024 (2409.10994); sign and unnormalised similarity of the released code.
    """

    text_guided: ClassVar[bool] = True

    clip: str = ""
    sign: int | None = None

    def __post_init__(self):
        super().__post_init__()
        choice("sign", self.sign, SIGNS)

    def score(self, t: Visual) -> torch.Tensor:
        return t.hide(relevance(t, self.clip, self.sign, unit=False)).softmax(1)

    def count(self, t: Visual, scores: torch.Tensor | None = None) -> torch.Tensor:
        if self.keep is not None:
            return super().count(t, scores)
        return torch.minimum(above_fence(scores, t.valid) + 1, t.total)

    def choose(self, t: Visual, scores: torch.Tensor) -> Choice:
        count = self.count(t, scores)
        kept = best(scores, count - 1, t.valid)
        host = best(scores, count, t.valid) & ~kept  # one token an image: the best of the others
        home = torch.where(kept, torch.arange(t.n, device=t.x.device), host.to(torch.uint8).argmax(1, keepdim=True))
        reduction = join(home if t.valid is None else home.masked_fill(~t.valid, -1), score=t.hide(scores))
        mean = t.project(reduction(t.features))
        summary = (host.gather(1, reduction.rep) & (count < t.total)[:, None])[..., None]
        return Choice(reduction, torch.where(summary, mean.to(t.x.dtype), gather_tokens(t.x, reduction.rep)))
