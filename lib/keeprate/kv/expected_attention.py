"""Expected Attention (2510.00636): queries to come are Gaussian, so the attention they will pay has a closed form."""

from dataclasses import dataclass

import torch

from keeprate import score
from keeprate.check import number, whole
from keeprate.kv.base import EvictMethod, Step
from keeprate.kv.rope import average_rotation, turn
from keeprate.method import register


@register(kind="eviction", needs=("queries", "keys", "values"))
@dataclass(frozen=True)
class ExpectedAttention(EvictMethod):
    """E[exp(q . k)] over future queries q ~ N(R mu, R Sigma R^T), times the norm of the value.

    mu and Sigma are the mean and covariance of the prompt's queries before the rotary embedding, R the rotation
    averaged over the next `horizon` positions. With the scaling s of the logits,
    S[k] = softmax_k(s R mu . k + s^2 k^T R Sigma R^T k / 2), mean over the query heads of a KV head, and the score is
    (S + epsilon) * ||v||. The softmax runs over the sinks too; the authors' code leaves them out.

    Args:
        keep: See `EvictMethod`.
        horizon: Future positions over which the rotation is averaged.
        sinks: First tokens that stay and whose queries are left out.
        epsilon: Added to S, so that the value's norm decides among tokens nobody is expected to attend to.
        covariance: Use Sigma; without it S is the attention of the mean query.

    Source: Expected Attention (2510.00636), attention of Gaussian queries to come.
    """

    horizon: int = 512
    sinks: int = 4
    epsilon: float = 0.02
    covariance: bool = True

    def __post_init__(self):
        whole("horizon", self.horizon)
        whole("sinks", self.sinks, 0)
        number("epsilon", self.epsilon, 0)
        super().__post_init__()

    def protected(self) -> int:
        return self.sinks

    def protect(self, step: Step) -> torch.Tensor:
        return step.sinks(self.sinks)

    def expected(self, step: Step) -> torch.Tensor:
        """[b, h, n] attention that future queries are expected to pay."""
        q = step.plain_queries()  # b h m d
        place = step.cache.seen - step.m + torch.arange(step.m, device=q.device) - step.start[:, 0]  # b m
        count = place >= (self.sinks if step.m > self.sinks else 0)
        count = (count if step.real is None else count & step.real).float()
        count = count / count.sum(1, keepdim=True).clamp_min(1)
        mean = torch.einsum("bm,bhmd->bhd", count, q)
        cos, sin = average_rotation(step.lengths, self.horizon, step.decoder, step.layer_index)  # b 1 d
        keys, s = step.view.k.float(), step.view.scaling
        turned = turn(mean[:, :, None], cos[:, None], sin[:, None])  # b h 1 d
        turned = turned.squeeze(2).unflatten(1, (step.groups, -1))  # b g r d
        logits = s * torch.einsum("bgrd,bgnd->bgrn", turned, keys)
        if self.covariance:
            centred = (q - mean[:, :, None]) * count[:, None, :, None].sqrt()
            # R Sigma R^T is the covariance of the turned queries, so Sigma itself is never turned
            centred = turn(centred, cos[:, None], sin[:, None]).unflatten(1, (step.groups, -1))
            sigma = torch.einsum("bgrmd,bgrme->bgrde", centred, centred)
            logits = logits + 0.5 * s * s * torch.einsum("bgnd,bgrde,bgne->bgrn", keys, sigma, keys)
        if step.valid is not None:
            logits = logits.masked_fill(~step.valid[:, :, None], float("-inf"))
        return logits.softmax(-1).flatten(1, 2)

    def score(self, step: Step) -> torch.Tensor:
        expected = step.by_kv_head(self.expected(step))
        return (expected + self.epsilon) * score.value_norm(step.view.v, per_head=True)
