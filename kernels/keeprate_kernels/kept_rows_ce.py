"""Cross-entropy of a linear output head whose backward pass goes through the kept rows alone: score all, train on some.

    loss = sum_t w[t] nll[t] / denominator,        nll[t] = log sum_v exp z[t, v] - z[t, label[t]]

Count products of a token with the head. With T tokens of which K have w != 0, plain autograd takes 3 T of them and
keeps [T, V] logits. Here scoring costs T (no graph, no logits: `token_stats`) and the backward pass 3 K: the logits of
the kept rows again, tile by tile, dz = w (softmax - onehot), then dhidden = dz weight and dweight = dz^T hidden. That
is less work where at most two thirds of the tokens are kept, and less memory always. `head_gradient` has the kernel.

torch's `linear_cross_entropy(reduction="none")` (2.13) costs T and 3 T whatever is kept, knows no soft cap, and holds
whole rows of logits instead of tiles that fit the cache; it is not used here.
"""

import torch

from keeprate_kernels.head_gradient import compile_specs as gradient_specs
from keeprate_kernels.runtime import CompileSpec, backend
from keeprate_kernels.token_stats import StatsFunction, TokenStats, prepare


def _check_weight(token_weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if token_weight.shape != shape:
        raise ValueError(f"token_weight must be {tuple(shape)}, as labels; got {tuple(token_weight.shape)}")
    if token_weight.is_complex():
        raise ValueError(f"token_weight must be real or boolean; got {token_weight.dtype}")
    return token_weight.reshape(-1)


def kept_rows_ce(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor,
    *,
    denominator: float | torch.Tensor | None = None,
    stats: TokenStats | None = None,
    score_rest: bool = True,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of token losses; tokens of weight 0 are scored and cost nothing in the backward pass.

    Args:
        hidden: [t, c] or [b, n, c], aligned with the labels (`hidden[:, :-1]` with `labels[:, 1:]`).
        weight: [V, c], the output head.
        labels: [t] or [b, n].
        token_weight: [t] or [b, n], any real weights, or a boolean mask of kept tokens. If it requires a gradient it
            gets d loss / d w[t] = nll[t] / denominator.
        denominator: What the sum is divided by, a number or a scalar tensor: the count of valid, kept or all tokens,
            the sum of the weights, ... None, the default, divides by nothing: no reduction is assumed. Where no token
            has a weight the loss is 0, and the denominator may be 0.
        stats: What `token_stats` gave for these very inputs; nothing is scored again.
        score_rest: False skips scoring tokens of weight 0; their nll is then 0. Without effect if `stats` are given.
        bias: [V].
        softcap: Cap of the logits, cap * tanh(logits / cap).
        ignore_index: Label of rows that do not count, whatever their weight.
        chunk: Tokens and vocabulary entries of a tile; None chooses by device.

    Returns:
        The loss (scalar) and the nll of every token without a graph, shaped as the labels; both fp32 (float64 for
        float64 inputs).

    Raises:
        ValueError: If shapes, dtypes, a label or the denominator do not fit.

    Source:
        The selective loss of Rho-1 (Lin et al. 2024, equation 5) and its relatives; every denominator of theirs is a
        value of `denominator`.

    Example:
        >>> hidden, weight, labels = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8), torch.arange(10)
        >>> with torch.no_grad():
        ...     stats = token_stats(hidden, weight, labels, stats=("nll",))
        >>> kept = stats.nll > stats.nll.median()
        >>> loss, nll = kept_rows_ce(hidden, weight, labels, kept, denominator=kept.sum(), stats=stats)
        >>> loss.backward()
        >>> bool((hidden.grad[~kept] == 0).all())
        True
    """
    shape = labels.shape
    hidden, weight, labels, bias, valid = prepare(hidden, weight, labels, bias, softcap, ignore_index, chunk)
    w = _check_weight(token_weight, shape)
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be a number or a scalar tensor; got shape {tuple(denominator.shape)}")
        denominator = denominator.reshape(())
    elif denominator is not None and not denominator >= 0:
        raise ValueError(f"denominator must be at least 0; got {denominator!r}")
    known = None
    if stats is not None:
        if stats.nll.shape != shape:
            raise ValueError(f"stats must be of {tuple(shape)} tokens, as labels; got {tuple(stats.nll.shape)}")
        known = stats.flat()
    kept = ((w != 0) & valid).nonzero()[:, 0]
    partial = known is None and not score_rest and kept.numel() < w.numel()
    if partial:
        hidden, labels, valid, w = (x.index_select(0, kept) for x in (hidden, labels, valid, w))
    nll = StatsFunction.apply(hidden, weight, bias, labels, valid, softcap, False, chunk, known)[0]
    loss = (w.to(nll.dtype) * nll).sum()
    if denominator is not None and kept.numel():
        if not isinstance(denominator, torch.Tensor) and denominator == 0:
            raise ValueError(f"denominator is 0, but {kept.numel()} tokens have a weight")
        loss = loss / denominator
    nll = nll.detach()
    if partial:
        nll = nll.new_zeros(shape.numel()).index_copy_(0, kept, nll)
    return loss, nll.view(shape)


def kept_rows_ce_reference(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """`kept_rows_ce` in plain torch, whatever the device."""
    with backend("reference"):
        return kept_rows_ce(*args, **kwargs)


def compile_specs() -> list[CompileSpec]:
    """What this op launches of `head_gradient`; it has no kernel of its own."""
    return [s for s in gradient_specs() if not s.constexprs["SPREAD"]][:1]
