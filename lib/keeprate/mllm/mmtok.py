"""MMTok: tokens that together cover the question's words and the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from keeprate import score
from keeprate.check import number
from keeprate.method import register
from keeprate.mllm.base import MLLMMethod, Visual, dropped, first
from keeprate.reduce import Reduction
from keeprate_kernels import farthest_point


@register(kind="pruning", needs=("features",))
@dataclass(frozen=True)
class MMTok(MLLMMethod):
    """Greedily maximise sum_m max_{n in S} P[m, n] / words + alpha sum_i max_{n in S} Q[i, n] / tokens.

    P is the softmax over visual tokens of cosine / temperature between the words' and the visual tokens' embeddings, Q
    that between the features of the vision encoder. The released code first strikes stop words and the prompt's
    closing phrase from the text; here all words behind the image count.

    Args:
        alpha: Weight of covering the image, against covering the words.
        tv_temperature: Temperature of P; the released code uses 0.02 for LLaVA, 0.01 for Qwen2.5-VL and InternVL.
        vv_temperature: Temperature of Q.

    Source: Dong et al. 2025 (2508.18264), equations of both coverages, temperatures of the released code.
    """

    text_guided: ClassVar[bool] = True

    alpha: float = 0.5
    tv_temperature: float = 0.02
    vv_temperature: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        number("alpha", self.alpha, 0)
        number("tv_temperature", self.tv_temperature, 1e-6)
        number("vv_temperature", self.vv_temperature, 1e-6)

    def before(self, t: Visual) -> Reduction | None:
        count = self.budget.each(t.total)
        if bool((count >= t.total).all()):
            return None
        matrix, weight = coverage(t, self.alpha, self.tv_temperature, self.vv_temperature)
        matrix.mul_(weight[..., None])
        order, _ = farthest_point(matrix, int(count.max()), objective="coverage", metric="similarity", valid=t.valid)
        return dropped(first(order, count, t.n))


def coverage(t: Visual, alpha: float, tv: float, vv: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What every visual token covers: (matrix [i, words + n, n], weight of its rows [i, words + n])."""
    words, spoken = t.question()
    spoken = torch.ones(words.shape[:2], dtype=torch.bool, device=t.x.device) if spoken is None else spoken
    there = torch.ones(t.x.shape[:2], dtype=torch.bool, device=t.x.device) if t.valid is None else t.valid
    logits = torch.cat([score.similarity(words, t.x).div_(tv), score.similarity(t.features).div_(vv)], 1)
    if t.valid is not None:
        logits.masked_fill_(~there[:, None], float("-inf"))
    weight = [spoken / spoken.sum(1, keepdim=True), alpha * there / t.total[:, None]]
    return logits.softmax(-1), torch.cat(weight, 1)
