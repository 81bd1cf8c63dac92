"""Baselines every figure of this family draws: chance and the best choice, for what is kept and for what is read."""

from dataclasses import dataclass, field

import torch
from torch import nn

from keeprate import score
from keeprate.anatomy import decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.kv.base import EvictMethod, ReadMethod, Step
from keeprate.method import register
from keeprate.select import Kept, keep_top


@register(kind="baseline")
@dataclass(frozen=True)
class RandomKV(EvictMethod):
    """Keep a uniformly random set of tokens per KV head.

    Args:
        keep: See `EvictMethod`.
    """

    def score(self, step: Step) -> torch.Tensor:
        return score.random((len(step.view.k), step.groups, step.n), step.generator, step.view.k.device)


@register(kind="baseline", needs=("the future",))
@dataclass(frozen=True)
class OracleKV(EvictMethod):
    """Keep the tokens that the future really attends to: mean attention of the rows that come after the prompt.

    Not a method one can use, but the line the others are measured against. Make it with `OracleKV.of`.

    Args:
        keep: See `EvictMethod`.
        future: One tensor [b, g, n] per treated layer, attention each prompt token will receive.

    Example:
        >>> oracle = OracleKV.of(llm.model, prompt_ids, answer_ids, keep=0.1)   # doctest: +SKIP
        >>> with oracle(llm.model):                                            # doctest: +SKIP
        ...     llm.model(prompt_ids)
    """

    future: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module, prompt: torch.Tensor, future: torch.Tensor, **params) -> "OracleKV":
        """The oracle for one batch: one full pass over prompt and future.

        Args:
            model: A causal language model.
            prompt: [b, n] ids.
            future: [b, m] ids that really follow (question and answer).
            **params: Fields of the method (keep, rest, re_position).
        """
        return cls(future=tuple(future_attention(model, prompt, future)), **params)

    def score(self, step: Step) -> torch.Tensor:
        if not self.future:
            raise ValueError("OracleKV needs the future: make it with OracleKV.of(model, prompt, future, keep=...)")
        given = self.future[step.layer]
        shape = (len(step.view.k), step.groups, step.n)
        if given.shape != shape:
            raise ValueError(f"this OracleKV was made for scores {tuple(given.shape)}; the prompt gives {shape}")
        return given.float()


@register(kind="baseline")
@dataclass(frozen=True)
class RandomRead(ReadMethod):
    """Read a uniformly random set of tokens per KV head at every decode step, and the newest token.

    Args:
        keep: See `ReadMethod`; the newest token counts.
    """

    def choose(self, step: Step) -> Kept | None:
        shape = len(step.view.k), step.groups, step.n
        chance = score.random(shape, step.generator, step.view.k.device)
        return _read_best(self, step, chance)


@register(kind="baseline", needs=("attention logits",))
@dataclass(frozen=True)
class TopKRead(ReadMethod):
    """Read the tokens to which the decode row gives most attention, mean over the query heads of each KV head.

    Not a method one would use, for it reads every key to choose, but no choice of as many tokens per KV head holds
    more attention: the line the others are measured against. The newest token is read too.

    Args:
        keep: See `ReadMethod`; the newest token counts.
    """

    def choose(self, step: Step) -> Kept | None:
        if step.n <= int(self.target(step).min()):
            return None
        self.reads(step, step.view.k)
        return _read_best(self, step, step.by_kv_head(step.logits(1)[:, :, 0].softmax(-1)))


def _read_best(method: ReadMethod, step: Step, scores: torch.Tensor) -> Kept | None:
    """The newest token and the best others by scores [b, g, n]; None = the budget holds everything."""
    target = method.target(step)
    if step.n <= int(target.min()):
        return None
    return keep_top(scores, target.expand(-1, step.groups), step.recent(1), step.valid)


class _Watch(Listener):
    """Attention that the first n keys receive from the rows behind them."""

    def __init__(self, n: int):
        self.n, self.seen = n, {}

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        weight = (torch.arange(view.q.shape[2], device=view.q.device) >= self.n).float()
        received = view.received(weight)[..., : self.n] / weight.sum()
        self.seen[module] = score.by_kv_head(received, view.k.shape[1])


@torch.no_grad()
def future_attention(model: nn.Module, prompt: torch.Tensor, future: torch.Tensor) -> list[torch.Tensor]:
    """Attention that prompt tokens receive from what follows, with the full cache.

    Args:
        model: A causal language model.
        prompt: [b, n] ids, without padding.
        future: [b, m] ids.

    Returns:
        For every treated layer [b, g, n]: mean over the m rows and over the query heads of each KV head.

    Raises:
        ValueError: If the future is empty or the batches differ.
    """
    if prompt.dim() != 2 or future.dim() != 2 or len(prompt) != len(future) or not future.shape[1]:
        raise ValueError(
            f"prompt [b, n] and future [b, m >= 1] must share b; got {tuple(prompt.shape)} and {tuple(future.shape)}"
        )
    body = decoder(model)
    modules = [body.attention[i] for i in body.treated]
    watch = _Watch(prompt.shape[1])
    with listen(model, watch, modules):
        model(torch.cat([prompt, future], 1), use_cache=False)
    return [watch.seen[module] for module in modules]
