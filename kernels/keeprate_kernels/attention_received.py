"""Column statistics of softmax(Q K^T) without the n x n matrix.

With P[q, k] = exp(L[q, k] - lse[q]), L[q, k] = scaling * Q[q] . K[k] + mask[q, k], the op returns for every head

    received[k] = sum_q w[q] P[q, k]                        (reduce="sum")
    received[k] = sum_q w[q] P[q, k] / sum_{q sees k} w[q]  (reduce="mean")
    received[k] = max_q w[q] P[q, k]                        (reduce="max")

Given lse (a fused attention kernel returns it, `attention_lse` computes it) one pass over Q K^T is left. A program of
the Triton kernel owns a block of keys and walks over the queries that can see it: nothing is written twice, there are
no atomics, and every run gives the same bits. The reference walks over tiles of query rows.
"""

import torch

from keeprate_kernels.attention_lse import (
    CHUNK,
    LOG2E,
    additive,
    blocks,
    check_attention,
    hidden_below,
    launch_lse,
    logit_tiles,
    mask_arguments,
    row_softmax_,
)
from keeprate_kernels.runtime import HAS_TRITON, INTERPRETED, CompileSpec, tl, triton, use_triton

REDUCTIONS = ("sum", "mean", "max")
GROUPS = (None, "mean", "sum", "max")
WARPS, STAGES = 8, 3  # 8 warps: the tile of logits and its accumulator fit the registers beside each other


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, *, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact attention probabilities of the given query rows.

    Args:
        query: [b, h, r, d], the few rows that are wanted.
        key: [b, g, n, d] with h a multiple of g (grouped-query attention).
        scaling: Factor on the logits, usually d ** -0.5.
        mask: Additive or boolean (True = visible), [b|1, h|1, r|1, n].

    Returns:
        [b, h, r, n] in fp32; rows sum to 1, or to 0 where the mask hides everything.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> q, k = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
        >>> attention_rows(q[:, :, :1], k, scaling=8**-0.5).shape
        torch.Size([1, 4, 1, 10])
    """
    check_attention(query, key, mask)
    (b, h, r, d), (g, n) = query.shape, key.shape[1:3]
    # query heads that share a key head are stacked as rows, so keys are never repeated
    logits = query.float().reshape(b, g, h // g * r, d) @ key.float().transpose(-1, -2)
    logits = logits.view(b, h, r, n) * scaling
    if mask is None:
        return logits.softmax(-1)
    return (logits + additive(mask)).softmax(-1).nan_to_num(0.0)


def _seeing(query, key, weight, mask, causal, chunk) -> torch.Tensor:
    """Sum of the weights of the rows that may see each key: [b, h, n_k], broadcast where it can be."""
    (b, h, n_q, _), n_k = query.shape, key.shape[2]
    if weight is None:
        weight = torch.ones(1, 1, n_q, device=query.device)
    if mask is None or mask.shape[2] == 1:  # a key hidden from all rows receives 0, whatever it is divided by
        if not causal:
            return weight.sum(-1, keepdim=True).expand(b, h, n_k)
        later = weight.double().flip(-1).cumsum(-1).flip(-1).float()  # sum over rows q and below
        first = (torch.arange(n_k, device=query.device) - (n_k - n_q)).clamp_min(0)  # first row that sees a key
        return later[..., first].expand(b, h, n_k)
    total = torch.zeros(b, h, n_k, device=query.device)
    for start in range(0, n_q, chunk):
        part = mask[:, :, start : start + chunk]
        sees = part if part.dtype == torch.bool else part > hidden_below(part)
        if causal:
            last = torch.arange(start, start + part.shape[2], device=query.device)[:, None] + n_k - n_q
            sees = sees & (torch.arange(n_k, device=query.device) <= last)
        total += (weight[:, :, None, start : start + chunk] @ sees.float())[:, :, 0]
    return total


@torch.no_grad()
def attention_received_reference(
    query, key, weight=None, *, scaling, mask=None, causal=False, reduce="sum", group=None, lse=None, chunk=CHUNK
) -> torch.Tensor:
    """`attention_received` in plain torch."""
    (b, h, n_q, _), (g, n_k) = query.shape, key.shape[1:3]
    total = torch.zeros(b * h, n_k, device=query.device)
    weights = None if weight is None else weight.float().expand(b, h, n_q).reshape(b * h, n_q)
    for heads, rows, x in logit_tiles(query, key, scaling, mask, causal, chunk, lse):
        if lse is None:
            norm = row_softmax_(x)[1][..., 0]
            # a row that sees nothing gives nothing; a NaN among the inputs stays one
            w = torch.where(norm == 0, 0.0, 1 / norm)
            w = w if weights is None else w * weights[heads, rows]
        else:
            x.exp2_()
            w = x.new_ones(x.shape[:2]) if weights is None else weights[heads, rows]
        into = total[heads, : x.shape[2]]
        if reduce == "max":
            torch.maximum(into, x.mul_(w[..., None]).amax(1), out=into)
        else:
            into[:, None].baddbmm_(w[:, None], x)  # weighs, normalises and sums in one pass over the tile
    total = total.view(b, h, n_k)
    if reduce == "mean":
        seeing = _seeing(query, key, weight, mask, causal, chunk)
        total = torch.where(seeing == 0, 0.0, total / seeing)
    if group is None:
        return total
    total = total.unflatten(1, (g, h // g))
    return {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[group](total, 2)


if HAS_TRITON:

    @triton.jit
    def _received_kernel(
        q_ptr,  # [b, h, n_q, d]
        k_ptr,  # [b, g, n_k, d]
        lse_ptr,  # [b, h, n_q] contiguous: base-2 log-sum-exp, +inf for a row that sees nothing
        w_ptr,  # [b, h, n_q], any strides
        mask_ptr,  # [b|1, h|1, n_q|1, n_k], any strides
        seeing_ptr,  # [b, h, n_k] what a mean divides by, any strides
        out_ptr,  # [b, h, n_k], or [b, g, n_k] for a group
        q_sb, q_sh, q_sm, q_sd,
        k_sb, k_sh, k_sn, k_sd,
        w_sb, w_sh, w_sm,
        mask_sb, mask_sh, mask_sm, mask_sn,
        seeing_sb, seeing_sh, seeing_sn,
        heads, n_q, n_k,
        scale2,  # scaling * log2(e)
        hidden,  # additive mask entries at or below it hide
        REP: tl.constexpr,  # query heads of a key head
        HEADS: tl.constexpr,  # query heads of this program: REP for a group, else 1
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        CAUSAL: tl.constexpr, MAX: tl.constexpr, GROUP_MAX: tl.constexpr, HAS_WEIGHT: tl.constexpr,
        HAS_MASK: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, HAS_SEEING: tl.constexpr,
        UPCAST: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """This program computes what BLOCK_N keys receive from HEADS query heads, over all query rows."""
        # heads are the fastest axis: under causality the blocks with the most rows, the first keys, are started first
        slot, n0 = tl.program_id(0), tl.program_id(1) * BLOCK_N
        per_batch = heads // HEADS
        b, first_head = (slot // per_batch).to(tl.int64), (slot % per_batch).to(tl.int64) * HEADS
        cols, d, tile = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
        k_at = k_ptr + b * k_sb + (first_head // REP) * k_sh + cols.to(tl.int64)[:, None] * k_sn + d[None, :] * k_sd
        k = tl.load(k_at, mask=(cols[:, None] < n_k) & (d[None, :] < D), other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        offset = n_k - n_q
        low = 0
        full = 0  # from this row on every row sees the whole block
        if CAUSAL:
            low = tl.maximum(0, n0 - offset) // BLOCK_M * BLOCK_M
            full = tl.cdiv(tl.maximum(0, n0 + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
            full = tl.minimum(tl.maximum(low, full), n_q)
        out = tl.zeros((BLOCK_N,), tl.float32)
        for i in range(HEADS):
            h = first_head + i
            q_base = q_ptr + b * q_sb + h * q_sh
            lse_base = lse_ptr + (b * heads + h) * n_q
            w_base = w_ptr + b * w_sb + h * w_sh
            mask_base = mask_ptr + b * mask_sb + h * mask_sh
            if HAS_MASK and not MASK_ROWS:  # a key mask: one value a key, for all rows
                if MASK_BOOL:
                    seen = tl.load(mask_base + cols.to(tl.int64) * mask_sn, mask=cols < n_k, other=0) != 0
                    key_bias = tl.where(seen, 0.0, float("-inf"))
                else:
                    key_bias = tl.load(mask_base + cols.to(tl.int64) * mask_sn, mask=cols < n_k, other=0.0)
                    key_bias = key_bias.to(tl.float32)
                    key_bias = tl.where(key_bias > hidden, key_bias * 1.4426950408889634, float("-inf"))
            # one number per (key, row of the tile): reduced once at the end, not in every step
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for phase in tl.static_range(2 if CAUSAL else 1):  # under causality first the rows that see only a part
                begin = low if CAUSAL and phase == 0 else full
                end = full if CAUSAL and phase == 0 else n_q
                for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
                    rows = start + tile
                    q_at = q_base + rows.to(tl.int64)[:, None] * q_sm + d[None, :] * q_sd
                    q = tl.load(q_at, mask=(rows[:, None] < n_q) & (d[None, :] < D), other=0.0)
                    if UPCAST:
                        q = q.to(tl.float32)
                    lse = tl.load(lse_base + rows, mask=rows < n_q, other=float("inf"))  # 2^(x - inf) = 0: no row
                    x = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :]
                    if HAS_MASK:
                        if MASK_ROWS:
                            at = mask_base + rows.to(tl.int64)[None, :] * mask_sm + cols.to(tl.int64)[:, None] * mask_sn
                            inside = (rows[None, :] < n_q) & (cols[:, None] < n_k)
                            if MASK_BOOL:
                                x = tl.where(tl.load(at, mask=inside, other=0) != 0, x, float("-inf"))
                            else:
                                bias = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                                x = tl.where(bias > hidden, x + bias * 1.4426950408889634, float("-inf"))
                        else:
                            x += key_bias[:, None]
                    if CAUSAL and phase == 0:
                        x = tl.where(cols[:, None] <= rows[None, :] + offset, x, float("-inf"))
                    p = tl.exp2(x)
                    if HAS_WEIGHT:
                        p *= tl.load(w_base + rows.to(tl.int64) * w_sm, mask=rows < n_q, other=0.0)[None, :]
                    if MAX:
                        acc = tl.maximum(acc, p)
                    else:
                        acc += p
            received = tl.max(acc, 1) if MAX else tl.sum(acc, 1)
            if HAS_SEEING:
                at = seeing_ptr + b * seeing_sb + h * seeing_sh + cols.to(tl.int64) * seeing_sn
                seeing = tl.load(at, mask=cols < n_k, other=0.0)
                received = tl.where(seeing == 0, 0.0, received / tl.where(seeing == 0, 1.0, seeing))
            if GROUP_MAX:
                out = tl.where(i == 0, received, tl.maximum(out, received))
            else:
                out += received
        tl.store(out_ptr + slot.to(tl.int64) * n_k + cols, out, mask=cols < n_k)


def _launch(query, key, weight, scaling, mask, causal, reduce, group, lse, chunk) -> torch.Tensor:
    """`attention_received` by the Triton kernel."""
    (b, h, n_q, d), (g, n_k) = query.shape, key.shape[1:3]
    heads = 1 if group is None else h // g
    out = torch.zeros(b, h // heads, n_k, device=query.device)
    if out.numel() == 0 or n_q == 0:
        return out
    lse = (launch_lse(query, key, scaling, mask, causal) if lse is None else lse.float()) * LOG2E
    lse = lse.masked_fill(lse == float("-inf"), float("inf")).contiguous()
    w = lse if weight is None else weight.expand(b, h, n_q)
    seeing = _seeing(query, key, weight, mask, causal, chunk) if reduce == "mean" else out.expand(b, -1, n_k)
    mask_, mask_strides, hidden = mask_arguments(query, key, mask)
    sizes = blocks(d, query.element_size(), n_q)
    _received_kernel[(b * h // heads, triton.cdiv(n_k, sizes["BLOCK_N"]))](
        query, key, lse, w, mask_, seeing, out, *query.stride(), *key.stride(), *w.stride(), *mask_strides,
        *seeing.stride(), h, n_q, n_k, scaling * LOG2E, hidden, REP=h // g, HEADS=heads, D=d, **sizes, CAUSAL=causal,
        MAX=reduce == "max", GROUP_MAX=group == "max", HAS_WEIGHT=weight is not None, HAS_MASK=mask is not None,
        MASK_BOOL=mask is not None and mask.dtype == torch.bool, MASK_ROWS=mask is not None and mask.shape[2] > 1,
        HAS_SEEING=reduce == "mean", UPCAST=INTERPRETED, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out.div_(heads) if group == "mean" else out


@torch.no_grad()
def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    reduce: str = "sum",
    group: str | None = None,
    lse: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Attention that every key receives, weighted over query rows, in O(n) memory; no gradient flows.

    A window of queries is a slice: `attention_received(q[:, :, -64:], k, scaling=s, causal=True)`.

    Args:
        query: [b, h, n_q, d].
        key: [b, g, n_k, d] with h a multiple of g.
        weight: Weight of each query row, broadcastable to [b, h, n_q], not negative for "max"; None weighs every row 1.
        scaling: Factor on the logits.
        mask: Additive or boolean (True = visible), [b|1, h|1, n_q|1, n_k]. Additive entries of -inf, or of the most
            negative number of the dtype, hide.
        causal: Query row i sees keys up to i + n_k - n_q (the last rows of a longer context).
        reduce: "sum", "mean" (over the rows that may see the key) or "max" over query rows.
        group: "mean", "sum" or "max" over the query heads that share a key head; None keeps the heads apart.
        lse: Known row log-sum-exp [b, h, n_q], natural logarithm, -inf for a row that sees nothing. Probabilities are
            relative to it, so `key` may be a part of the keys that it was taken over.
        chunk: Query rows the reference holds at once, over the heads that share a key head.

    Returns:
        [b, h, n_k], with `group` [b, g, n_k], in fp32; keys that nobody sees receive 0. With reduce="sum" and no weight
        the entries of a head sum to n_q.

    Raises:
        ValueError: If shapes, `reduce` or `group` do not fit.

    Example:
        >>> q = k = torch.randn(2, 4, 100, 16)
        >>> attention_received(q, k, scaling=0.25).sum(-1).allclose(torch.full((2, 4), 100.0), rtol=1e-4)
        True
    """
    check_attention(query, key, mask)
    b, h, n_q, _ = query.shape
    for name, value, allowed in (("reduce", reduce, REDUCTIONS), ("group", group, GROUPS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if lse is not None and lse.shape != (b, h, n_q):
        raise ValueError(f"lse must be [b, h, n_q], here [{b}, {h}, {n_q}]; got {tuple(lse.shape)}")
    if weight is not None:
        if weight.dim() > 3 or any(w not in (1, n) for w, n in zip(weight.shape[::-1], (n_q, h, b), strict=False)):
            raise ValueError(f"weight must be broadcastable to [{b}, {h}, {n_q}]; got {tuple(weight.shape)}")
        weight = weight.to(device=query.device, dtype=torch.float32)[(None,) * (3 - weight.dim())]
    if use_triton(query, key, weight, mask, lse):
        return _launch(query, key, weight, scaling, mask, causal, reduce, group, lse, chunk)
    return attention_received_reference(
        query, key, weight, scaling=scaling, mask=mask, causal=causal, reduce=reduce, group=group, lse=lse, chunk=chunk
    )


def compile_specs() -> list[CompileSpec]:
    """The specialisations that the tests build: sums and maxima, groups, weights, means and each kind of mask."""
    types = dict.fromkeys(("lse_ptr", "w_ptr", "seeing_ptr", "out_ptr"), "*fp32")
    types |= {"q_ptr": "*bf16", "k_ptr": "*bf16", "scale2": "fp32", "hidden": "fp32"}
    strides = "q_sb q_sh q_sm k_sb k_sh k_sn w_sb w_sh mask_sb mask_sh mask_sm seeing_sb seeing_sh"
    types |= dict.fromkeys((*strides.split(), "heads", "n_q", "n_k"), "i32")
    common = dict.fromkeys(("q_sd", "k_sd", "w_sm", "mask_sn", "seeing_sn"), 1) | {"REP": 4, "UPCAST": False}
    return [
        CompileSpec(
            _received_kernel,
            types | {"mask_ptr": "*u8" if mask == "bool" else "*bf16"},
            common | blocks(d, 2, n_q) | {
                "D": d, "HEADS": 4 if group else 1, "CAUSAL": causal, "MAX": reduce == "max",
                "GROUP_MAX": group == "max", "HAS_WEIGHT": full, "HAS_SEEING": reduce == "mean",
                "HAS_MASK": mask is not None, "MASK_BOOL": mask == "bool", "MASK_ROWS": full, "STAGES": STAGES,
            },
            num_warps=WARPS,
        )
        for d, n_q, causal, reduce, group, mask, full in (
            (128, 4096, False, "sum", None, None, False), (128, 4096, True, "sum", "mean", None, False),
            (128, 4096, True, "max", "max", "key", False), (128, 64, True, "mean", "mean", "bool", True),
            (80, 4096, False, "sum", None, "key", True), (256, 4096, True, "sum", None, None, False),
        )
    ]  # fmt: skip
