"""Ground truth: what the tokens of a prompt mean to what really follows."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from keeprate.attention import AttentionView, Listener, listen
from keeprate.check import choice, whole
from keeprate.measure.kv.reading import Prefill
from keeprate.score import by_kv_head, eviction_error

ATTENTION_TRUTHS = ("oracle", "leave_one_out")
TRUTHS = (*ATTENTION_TRUTHS, "leave_one_out_loss", "grad_x_input")
Scores = list[torch.Tensor]  # per treated layer [b, g, n], higher = matters more


class _Future(Listener):
    """What prompt tokens mean to the rows behind them: attention they receive, and the output's change without them."""

    def __init__(self, n: int, output: bool):
        self.n, self.output = n, output
        self.attention: dict[nn.Module, torch.Tensor] = {}
        self.change: dict[nn.Module, torch.Tensor] = {}

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        g, m = view.k.shape[1], view.q.shape[2]
        self.attention[module] = by_kv_head(view.received()[..., : self.n] / m, g)
        if self.output:
            error = eviction_error(view.probs().unflatten(1, (g, -1)), view.v)  # b g r m n
            self.change[module] = error.mean((2, 3))[..., : self.n]


@torch.no_grad()
def _future(begin: Prefill, future: torch.Tensor, output: bool) -> tuple[Scores, Scores]:
    watch = _Future(begin.ids.shape[1], output)
    modules = [begin.body.attention[i] for i in begin.body.treated]
    with listen(begin.model, watch, modules):
        begin.model(future, past_key_values=begin.full())
    return [watch.attention[m] for m in modules], [watch.change[m] for m in modules if output]


def oracle(begin: Prefill, future: torch.Tensor) -> Scores:
    """Attention that prompt tokens receive from the rows that follow: mean over rows and heads of a KV head.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.

    Returns:
        For every treated layer [b, g, n], as `kv.future_attention` gives it.
    """
    return _future(begin, future.to(begin.ids.device), False)[0]


def leave_one_out(begin: Prefill, future: torch.Tensor) -> Scores:
    """How far the attention output moves when one cached pair is masked: a / (1 - a) * ||o - v||, exactly.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.

    Returns:
        For every treated layer [b, g, n]: mean over the m rows and the query heads of each KV head; the output is
        that of a head, before the output projection.

    Source: closed form of the eviction error, CAOTE (2504.14051).
    """
    return _future(begin, future.to(begin.ids.device), True)[1]


@torch.no_grad()
def leave_one_out_loss(
    begin: Prefill, future: torch.Tensor, targets: int, positions: torch.Tensor | None = None, rows: int = 4096
) -> torch.Tensor:
    """How much the loss of what follows grows when one token is masked in all layers and heads.

    The replicas of the future that each miss one token stand side by side in one sequence and do not see each other,
    so that the prompt's cache is held once.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: The loss is the mean over so many last tokens of the future; at most m - 1.
        positions: Prompt tokens to mask; None = all.
        rows: Query rows of one call, all samples together: more are faster and need more memory.

    Returns:
        [b, positions]: nats a token, positive = the token matters.

    Raises:
        ValueError: If `targets` does not fit, or the model has layers with a sliding window.
    """
    b, n = begin.ids.shape
    m = future.shape[1]
    _check_targets(targets, m)
    if len(begin.body.treated) != len(begin.body.attention):
        raise ValueError("masking single tokens needs a model whose layers all cache the whole context")
    device, dtype = begin.ids.device, begin.views[0].q.dtype
    future = future.to(device)
    positions = torch.arange(n, device=device) if positions is None else positions.to(device)
    within = torch.ones(m, m, dtype=torch.bool, device=device).tril()

    def losses(without: torch.Tensor) -> torch.Tensor:
        """[b, r] loss of each replica; `without` [r] holds the token it misses, n = none."""
        r = len(without)
        others = torch.arange(n, device=device) != without.repeat_interleave(m)[:, None]  # rm n
        own = torch.block_diag(*[within] * r).bool()  # rm rm
        seen = torch.cat([others, own], 1)[None, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        logits = begin.model(
            future.repeat(1, r),
            past_key_values=begin.full(),
            position_ids=(n + torch.arange(m, device=device)).repeat(r)[None],
            attention_mask=mask.expand(b, -1, -1, -1),
        ).logits.unflatten(1, (r, m))
        return nll(logits[:, :, :-1], future[:, None, 1:].expand(-1, r, -1))[..., -targets:].mean(-1)

    each = max(1, rows // (m * b))
    whole_cache = losses(torch.tensor([n], device=device))
    return torch.cat([losses(part) for part in positions.split(each)], 1) - whole_cache


def grad_x_input(begin: Prefill, future: torch.Tensor, targets: int) -> Scores:
    """First-order change of the loss if a cached pair were zero: |sum_d k dL/dk + v dL/dv|.

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: The loss is the mean over so many last tokens of the future; at most m - 1.

    Returns:
        For every treated layer [b, g, n].

    Raises:
        ValueError: If `targets` does not fit.
    """
    _check_targets(targets, future.shape[1])
    future = future.to(begin.ids.device)
    with torch.enable_grad():
        pairs = [tuple(x.detach().clone().requires_grad_() for x in (view.k, view.v)) for view in begin.views]
        cache = DynamicCache(config=begin.body.body.config)
        for i, (k, v) in enumerate(pairs):
            cache.update(k, v, i)
        logits = begin.model(future, past_key_values=cache).logits
        # summed over samples: each has only its own pairs to answer for
        loss = nll(logits[:, :-1], future[:, 1:])[:, -targets:].mean(1).sum()
        leaves = [x for i in begin.body.treated for x in pairs[i]]
        gradients = torch.autograd.grad(loss, leaves)
    products = [(x.detach().float() * g.float()).sum(-1) for x, g in zip(leaves, gradients, strict=True)]
    return [(k + v).abs() for k, v in zip(products[::2], products[1::2], strict=True)]


def truths(
    begin: Prefill, future: torch.Tensor, targets: int, which: Sequence[str] = TRUTHS, rows: int = 4096
) -> dict[str, Scores]:
    """Several ground truths by name, each a list over the treated layers of [b, g, n].

    Args:
        begin: The prompt.
        future: [b, m] ids that really follow.
        targets: See `leave_one_out_loss`.
        which: Some of `TRUTHS`. "leave_one_out_loss" knows tokens, not layers and heads: it is the same in all.
        rows: See `leave_one_out_loss`.

    Raises:
        ValueError: On an unknown name, or as the single ones do.
    """
    for name in which:
        choice("truth", name, TRUTHS)
    found: dict[str, Scores] = {}
    if {"oracle", "leave_one_out"} & set(which):
        received, change = _future(begin, future.to(begin.ids.device), "leave_one_out" in which)
        found |= {"oracle": received, "leave_one_out": change}
    if "leave_one_out_loss" in which:
        loss = leave_one_out_loss(begin, future, targets, rows=rows)[:, None]
        found["leave_one_out_loss"] = [loss.expand(-1, begin.body.kv_heads, -1)] * len(begin.body.treated)
    if "grad_x_input" in which:
        found["grad_x_input"] = grad_x_input(begin, future, targets)
    return {name: found[name] for name in which}


def _check_targets(targets: int, m: int) -> None:
    if whole("targets", targets) >= m:
        raise ValueError(f"targets must lie in 1..{m - 1}, fewer than the {m} tokens that follow; got {targets}")


def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token [...] under logits [..., v], in nats."""
    return -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
