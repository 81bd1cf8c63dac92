"""What a language model thinks of every token, from hidden states and the output head, without logits in memory.

With z[v] = hidden . weight[v] + bias[v] (soft-capped: cap tanh(z / cap)), lse = log sum_v exp z[v], p = exp(z - lse):

    nll      = lse - z[label]
    mean     = sum_v p[v] log p[v] = -entropy
    variance = sum_v p[v] (log p[v] - mean)^2

A tile of tokens x vocabulary entries exists at a time. A tile has its own maximum m, sum S = sum exp(z - m), weighted
mean M and squared deviation Q = sum exp(z - m) (z - M)^2; two tiles (or two splits of the vocabulary) merge as in Chan
et al. 1983, so that nothing cancels. Gradients recompute tiles (`head_gradient`) and touch only rows that some gradient
reaches: a token of weight 0 costs nothing in the backward pass.
"""

from typing import NamedTuple

import torch

from keeprate_kernels.head_gradient import (
    CPU_TILE,
    GPU_TILE,
    blocks,
    config,
    configure,
    head_gradient,
    tile_logits,
    widened,
)
from keeprate_kernels.runtime import HAS_TRITON, CompileSpec, backend, tl, triton, use_triton

if HAS_TRITON:
    from keeprate_kernels.head_gradient import logits_tile

STATS = ("nll", "entropy", "mean", "variance")


class TokenStats(NamedTuple):
    """Statistics of the distribution that predicted each token, fp32 and shaped like the labels.

    Attributes:
        nll: -log p(label); 0 where the label is ignored.
        entropy: In nats; None if not asked for, as the next two.
        mean: Mean of log p under p, which is -entropy.
        variance: Variance of log p under p.
        lse: Log-sum-exp of the logits.
        correct: Whether no entry has a larger logit than the label (a tie counts); False where ignored.
    """

    nll: torch.Tensor
    entropy: torch.Tensor | None
    mean: torch.Tensor | None
    variance: torch.Tensor | None
    lse: torch.Tensor
    correct: torch.Tensor

    @property
    def prob(self) -> torch.Tensor:
        """Probability of the label; 1 where it is ignored."""
        return (-self.nll).exp()

    def flat(self) -> "TokenStats":
        """The same in one dimension, without a graph."""
        return TokenStats(*(None if x is None else x.detach().reshape(-1) for x in self))


if HAS_TRITON:

    @triton.jit
    def _stats_kernel(
        h_ptr,  # [t, c]
        w_ptr,  # [v, c]
        bias_ptr,  # [v]
        label_ptr,  # [t] int64
        out_ptr,  # [5, splits, t] fp32: maximum, sum, logit of the label, mean above maximum, squared deviation
        t, v, c, stride_ht, stride_hc, stride_wv, stride_wc, softcap, per_split, splits,
        SPREAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_C: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """This program computes the statistics of BLOCK_T tokens over one split of the vocabulary."""
        # tokens vary fastest, so programs that run together read the same rows of the weight
        tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        split = tl.program_id(1)
        rows = tl.minimum(tokens, t - 1)
        label = tl.load(label_ptr + rows).to(tl.int32)
        top = tl.full([BLOCK_T], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        hit = tl.zeros([BLOCK_T], tl.float32)
        mean = tl.zeros([BLOCK_T], tl.float32)
        dev = tl.zeros([BLOCK_T], tl.float32)
        start = split * per_split
        for j in range(start, tl.minimum(start + per_split, v), BLOCK_V):
            cols = j + tl.arange(0, BLOCK_V)
            # a column past the end repeats the last one: it cannot change the maximum, and its weight is 0 below
            z = logits_tile(
                h_ptr, w_ptr, bias_ptr, rows, tl.minimum(cols, v - 1), c, stride_ht, stride_hc, stride_wv, stride_wc,
                softcap, HAS_BIAS, HAS_CAP, EVEN_C, UPCAST, BLOCK_T, BLOCK_V, BLOCK_C,
            )  # fmt: skip
            hit += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), 1)
            new = tl.maximum(top, tl.max(z, 1))
            z = z - new[:, None]
            p = tl.where((cols < v)[None, :], tl.exp(z), 0.0)
            part = tl.sum(p, 1)
            old = tl.exp(top - new)
            both = total * old + part
            if SPREAD:
                # a tile far below the running maximum may sum to 0 in fp32: it has no mean, and no say
                center = tl.sum(p * z, 1) / tl.maximum(part, 1e-37)
                z = z - center[:, None]
                shifted = tl.where(total > 0, mean + (top - new), 0.0)
                gap = center - shifted
                share = part / both
                dev = dev * old + tl.sum(p * z * z, 1) + gap * gap * (total * old) * share
                mean = shifted + gap * share
            total = both
            top = new
        out = out_ptr + tl.cast(split, tl.int64) * t + tokens
        step = tl.cast(splits, tl.int64) * t
        inside = tokens < t
        tl.store(out, top, mask=inside)
        tl.store(out + step, total, mask=inside)
        tl.store(out + 2 * step, hit, mask=inside)
        if SPREAD:
            tl.store(out + 3 * step, mean, mask=inside)
            tl.store(out + 4 * step, dev, mask=inside)


def _splits(programs: int, count: int, device: torch.device) -> int:
    """Splits of the vocabulary that leave the fewest rounds of tiles, the fewest splits among equals."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return min(range(1, min(count, 64) + 1), key=lambda s: (-(-programs * s // sms) * -(-count // s), s))


def _forward_triton(hidden, weight, bias, labels, softcap, spread):
    (t, c), v = hidden.shape, weight.shape[0]
    block, flags, launch = configure(hidden, bias, softcap, wide=True)
    count = triton.cdiv(v, block["BLOCK_V"])
    splits = _splits(triton.cdiv(t, block["BLOCK_T"]), count, hidden.device)
    per_split = triton.cdiv(count, splits) * block["BLOCK_V"]
    splits = triton.cdiv(v, per_split)  # none is empty
    out = torch.empty(5 if spread else 3, splits, t, device=hidden.device)
    _stats_kernel[triton.cdiv(t, block["BLOCK_T"]), splits](
        hidden, weight, bias, labels, out, t, v, c, *hidden.stride(), *weight.stride(), softcap or 1.0, per_split,
        splits, SPREAD=spread, **flags, **launch,
    )  # fmt: skip
    top, scale = out[0].amax(0), out[0] - out[0].amax(0)
    part = out[1] * scale.exp()
    total = part.sum(0)
    if not spread:
        return top, total, out[2].sum(0), None, None
    means = out[3] + scale  # above the maximum of all splits
    mean = (part * means).sum(0) / total
    dev = (scale.exp() * out[4] + part * (means - mean) ** 2).sum(0)
    return top, total, out[2].sum(0), mean, dev / total


def _forward_torch(hidden, weight, bias, labels, softcap, spread, chunk):
    t, v = hidden.shape[0], weight.shape[0]
    hidden = hidden.to(widened(hidden.dtype))  # a product in bf16 is slow on a CPU
    tile, exps = hidden.new_empty(2, min(t, chunk[0]) * min(v, chunk[1]))
    total, hit, mean, dev = hidden.new_zeros(4, t)
    top = hidden.new_full((t,), -torch.inf)
    for cols in blocks(v, chunk[1]):
        w = weight[cols].to(hidden.dtype)
        for rows in blocks(t, chunk[0]):
            z = tile_logits(tile, hidden[rows], w, None if bias is None else bias[cols], softcap)
            index = labels[rows] - cols.start
            inside = (index >= 0) & (index < z.shape[1])
            hit[rows] += torch.where(inside, z.gather(1, index.clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0)
            new = z.amax(1).maximum(top[rows])
            fall = top[rows] - new
            p = torch.exp(z.sub_(new[:, None]), out=exps[: z.numel()].view_as(z))
            part, before = p.sum(1), total[rows] * fall.exp()
            both = before + part
            if spread:
                center = torch.linalg.vecdot(p, z) / part.clamp(min=1e-37)
                shifted = torch.where(before > 0, mean[rows] + fall, 0)
                gap, share = center - shifted, part / both
                p *= z.sub_(center[:, None])
                dev[rows] = dev[rows] * fall.exp() + torch.linalg.vecdot(p, z) + gap**2 * before * share
                mean[rows] = shifted + gap * share
            total[rows], top[rows] = both, new
    return (top, total, hit, mean, dev / total) if spread else (top, total, hit, None, None)


class StatsFunction(torch.autograd.Function):
    """(nll, mean, variance, lse, correct) of 2-D inputs; `known` (a TokenStats) is believed rather than recomputed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, valid, softcap, spread, chunk, known):
        # float64 has no kernel, and no token no program
        ctx.on_triton = use_triton(hidden, weight, bias, labels) and hidden.dtype != torch.float64 and len(hidden) > 0
        ctx.softcap, ctx.chunk = softcap, chunk or (GPU_TILE if hidden.is_cuda else CPU_TILE)
        ctx.set_materialize_grads(False)
        if known is not None:
            nll, lse, correct = known.nll.clone(), known.lse.clone(), known.correct.clone()
            top, log_total, mean, variance = lse, torch.zeros_like(lse), None, None
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                if ctx.on_triton:
                    found = _forward_triton(hidden, weight, bias, labels, softcap, spread)
                else:
                    found = _forward_torch(hidden, weight, bias, labels, softcap, spread, ctx.chunk)
            top, total, hit, mean, variance = found
            log_total = total.log()
            # logits may be large, and lse rounds at their size: everything else stays relative to the largest one
            nll, correct = torch.where(valid, top - hit + log_total, 0), valid & (hit >= top)
            lse, mean = top + log_total, None if mean is None else mean - log_total
        ctx.save_for_backward(hidden, weight, bias, labels, valid, top, log_total, mean, variance)
        ctx.mark_non_differentiable(correct)
        return nll, mean, variance, lse, correct

    @staticmethod
    def backward(ctx, g_nll, g_mean, g_variance, g_lse, _):
        if torch.is_grad_enabled():  # only under create_graph=True; once_differentiable would let some of it pass
            raise RuntimeError(
                "token_stats and kept_rows_ce can be differentiated once; create_graph=True asks for more"
            )
        hidden, weight, bias, labels, valid, top, log_total, mean, variance = ctx.saved_tensors
        zero = torch.zeros_like(top)
        spread = g_mean is not None or g_variance is not None
        pull = zero if g_nll is None else torch.where(valid, g_nll, 0)
        push = pull if g_lse is None else pull + torch.where(valid, g_lse, 0)
        linear = zero if g_mean is None else torch.where(valid, g_mean, 0)
        quadratic = zero if g_variance is None else torch.where(valid, g_variance, 0)
        kept = ((pull != 0) | (push != 0) | (linear != 0) | (quadratic != 0)).nonzero()[:, 0]
        # p (d^2 + 2 d - variance): the constant joins push
        push = push if g_variance is None else push - quadratic * variance
        coefficients = torch.stack((top, log_total, push, pull, mean if spread else zero, linear, quadratic))
        rest = kept.numel() < labels.numel()
        rows = hidden.index_select(0, kept) if rest else hidden
        if rest:
            labels, coefficients = labels[kept], coefficients.index_select(1, kept)
        with torch.autocast(hidden.device.type, enabled=False):
            dhidden, dweight, dbias = head_gradient(
                rows, weight, bias, labels, ctx.softcap, coefficients, spread, ctx.needs_input_grad, ctx.on_triton,
                ctx.chunk,
            )  # fmt: skip
        if dhidden is not None:
            dhidden = torch.zeros_like(hidden).index_copy_(0, kept, dhidden.to(hidden.dtype)) if rest else dhidden
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, dbias, None, None, None, None, None, None


def prepare(hidden, weight, labels, bias, softcap, ignore_index, chunk):
    """Checked inputs in two dimensions, cast as autocast would, and the mask of labels that count."""
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [tokens, c] or [batch, n, c] and weight [V, c] with the same c and V > 0; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {tuple(hidden.shape[:-1])}, as hidden; got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers; got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none; got {softcap!r}")
    if chunk is not None and (len(chunk) != 2 or min(chunk) < 1):
        raise ValueError(f"chunk must be (tokens, vocabulary entries), both at least 1; got {chunk!r}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # what torch.nn.functional.linear would do
        low = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
    if not hidden.is_floating_point() or any(x is not None and x.dtype != hidden.dtype for x in (weight, bias)):
        given = ", ".join(str(x.dtype) for x in (hidden, weight, bias) if x is not None)
        raise ValueError(f"hidden, weight and bias must share one floating-point dtype; got {given}")
    labels = labels.reshape(-1).long().contiguous()
    valid = labels != ignore_index
    wrong = labels[valid & ((labels < 0) | (labels >= weight.shape[0]))]
    if wrong.numel():
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}) or be ignore_index={ignore_index}; got {wrong[0].item()}"
        )
    bias = None if bias is None else bias.contiguous()
    return hidden.reshape(-1, hidden.shape[-1]), weight, labels, bias, valid


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[str, ...] = STATS,
    known: TokenStats | None = None,
    chunk: tuple[int, int] | None = None,
) -> TokenStats:
    """Loss, entropy, and mean and variance of log-probabilities of every token, without logits in memory.

    Differentiable in hidden, weight and bias, once (every statistic but `correct`). Rows that no gradient reaches are
    skipped in the backward pass.

    Args:
        hidden: [t, c] or [b, n, c], the states that go into the output head, aligned with the labels: for a causal
            model `hidden[:, :-1]` with `labels[:, 1:]`.
        weight: [V, c], the output head.
        labels: [t] or [b, n], the tokens that are predicted.
        bias: [V].
        softcap: Cap of the logits, cap * tanh(logits / cap) (Gemma 2).
        ignore_index: Label of rows that do not count: their nll is 0, and no statistic of theirs has a gradient.
        stats: Which of "nll", "entropy", "mean", "variance" are wanted. nll, lse and correct come with any of them.
        known: nll, lse and correct of these very inputs, found elsewhere: they get their graph, and nothing is scored
            again. Only with stats=("nll",).
        chunk: Tokens and vocabulary entries of a tile in plain torch and in the backward pass; None chooses by device.

    Returns:
        TokenStats in fp32 (float64 for float64 inputs), each shaped as the labels.

    Raises:
        ValueError: If shapes, dtypes, a label, a name in `stats` or what is `known` do not fit.

    Source:
        Online softmax: Milakov and Gimelshein 2018. Merging of variances: Chan, Golub and LeVeque 1983. Mean and
        variance of log-probabilities as a score: Min-K%++ (Zhang et al. 2024, equation 3).

    Example:
        >>> hidden, weight, labels = torch.randn(10, 8), torch.zeros(50, 8), torch.arange(10)
        >>> bool(token_stats(hidden, weight, labels).entropy.allclose(torch.tensor(50.0).log()))
        True
    """
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    if not stats or set(stats) - set(STATS):
        raise ValueError(f"stats must name some of {', '.join(STATS)}; got {stats!r}")
    shape = labels.shape
    hidden, weight, labels, bias, valid = prepare(hidden, weight, labels, bias, softcap, ignore_index, chunk)
    spread = stats != ("nll",)
    if known is not None:
        if spread or known.nll.shape != shape:
            raise ValueError(
                f"known must be of {tuple(shape)} tokens, as labels, with stats=('nll',); "
                f"got {tuple(known.nll.shape)} and {stats!r}"
            )
        known = known.flat()
    nll, mean, variance, lse, correct = (
        None if x is None else x.view(shape)
        for x in StatsFunction.apply(hidden, weight, bias, labels, valid, softcap, spread, chunk, known)
    )
    return TokenStats(
        nll,
        -mean if "entropy" in stats else None,
        mean if "mean" in stats else None,
        variance if "variance" in stats else None,
        lse,
        correct,
    )


def token_stats_reference(*args, **kwargs) -> TokenStats:
    """`token_stats` in plain torch, whatever the device."""
    with backend("reference"):
        return token_stats(*args, **kwargs)


def compile_specs() -> list[CompileSpec]:
    """The kernel as it is launched in bf16: on an H100; with bias, soft cap and odd c; nll alone of one token."""
    ints = ("t", "v", "c", "stride_ht", "stride_wv", "per_split", "splits")
    signature = {"h_ptr": "*bf16", "w_ptr": "*bf16", "label_ptr": "*i64", "out_ptr": "*fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(ints, "i32")
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "EVEN_C": True, "UPCAST": False, "bias_ptr": None}
    plain |= {"stride_hc": 1, "stride_wc": 1}
    full = {k: x for k, x in plain.items() if k != "bias_ptr"} | {"HAS_BIAS": True, "HAS_CAP": True, "EVEN_C": False}
    single = {k: x for k, x in signature.items() if k not in ("t", "splits")}
    (a100, launch), (h100, _) = (config(torch.bfloat16, capability, wide=True) for capability in (80, 90))
    return [
        CompileSpec(_stats_kernel, signature, plain | h100 | {"SPREAD": True}, **launch),
        CompileSpec(_stats_kernel, signature | {"bias_ptr": "*bf16"}, full | a100 | {"SPREAD": True}, **launch),
        CompileSpec(_stats_kernel, single, plain | a100 | {"SPREAD": False, "t": 1, "splits": 1}, **launch),
    ]
