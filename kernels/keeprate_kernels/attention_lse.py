"""Row log-sum-exp of the attention logits, without the n x n matrix.

With L[q, k] = scaling * Q[q] . K[k] + mask[q, k] over the keys that row q may see,

    lse[q] = log sum_k exp L[q, k]

which is all that separates a logit from its probability: P[q, k] = exp(L[q, k] - lse[q]). The kernel and the reference
work on base-2 logits, L * log2(e), because exp2 is what hardware (and a CPU's vector library) computes fastest.

Also here: what this op and `attention_received` share, their shape checks and the tiles of logits of the references.
"""

import math
from collections.abc import Iterator

import torch

from keeprate_kernels.runtime import HAS_TRITON, INTERPRETED, CompileSpec, tl, triton, use_triton

CHUNK = 128  # stacked query rows at a time: at n = 4096 on two CPU cores 64 to 128 are fastest, 128 at head dim 128
TILE = 2**18  # logits held at once for each thread, over heads and batch: 1 MiB stays in a core's cache
LOG2E = 1 / math.log(2)
LOWEST = torch.finfo(torch.float32).min


def check_attention(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise a ValueError that names the shapes unless query [b, h, n_q, d], key [b, g, n_k, d] and mask fit."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must be [batch, heads, tokens, dim]; got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query and key must agree in batch and head dim, and query heads must be a multiple of key heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if mask is None:
        return
    b, h, n_q, n_k = *query.shape[:3], key.shape[2]
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, (b, h, n_q), strict=False))
    if not fits or mask.shape[-1] != n_k:
        raise ValueError(
            f"mask must be [b|1, h|1, n_q|1, n_k], here [{b}|1, {h}|1, {n_q}|1, {n_k}]; got {tuple(mask.shape)}"
        )


def hidden_below(mask: torch.Tensor) -> float:
    """Additive entries at or below this hide a key: -inf, and the most negative number of the mask's dtype."""
    return torch.finfo(mask.dtype).min / 2


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A boolean (True = visible) or additive mask as fp32 addends, -inf where hidden."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.float().masked_fill(mask <= hidden_below(mask), float("-inf"))


def logit_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    causal: bool,
    chunk: int,
    lse: torch.Tensor | None = None,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Base-2 logits (minus a known row log-sum-exp), tile by tile, in one buffer that the next tile overwrites.

    Yields:
        (heads, rows, x): `heads` indexes the flattened [b * h], `rows` the queries, x is [heads, rows, seen] with the
        first `seen` keys, those that a causal chunk can see.
    """
    (b, h, n_q, d), (g, n_k) = query.shape, key.shape[1:3]
    rep, offset = h // g, n_k - n_q
    # query heads that share a key head are stacked as rows of one matrix product: keys are never repeated
    query, step = query.unflatten(1, (g, rep)), max(1, min(n_q, chunk // rep))
    held = max(1, TILE * torch.get_num_threads() // max(1, rep * step * n_k))  # key heads of a tile
    step_b, step_g = (min(b, held // g), g) if held >= g else (1, held)
    # row i sees keys up to i + offset, so only the last columns of a tile need masking: -inf where j > a - step
    future = torch.full((2 * step, step), float("-inf"), device=query.device).triu_(1 - step) if causal else None
    buffer = torch.empty(step_b * step_g * rep * step * n_k, device=query.device)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (g, rep))  # b|1, g|1, rep|1, n_q|1, n_k
    if lse is not None:
        lse = lse.float() * LOG2E
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).unflatten(1, (g, rep))[..., None]  # b g rep n_q 1

    def part(x: torch.Tensor, *where: slice) -> torch.Tensor:
        """A tile of a tensor whose dimensions of size 1 stand for all."""
        return x[tuple(s if n > 1 else slice(None) for s, n in zip(where, x.shape, strict=False))]

    for b0 in range(0, b, step_b):
        for g0 in range(0, g, step_g):
            batch, groups = slice(b0, min(b0 + step_b, b)), slice(g0, min(g0 + step_g, g))
            k = key[batch, groups].float().flatten(0, 1).transpose(1, 2)  # bg d n_k
            for start in range(0, n_q, step):
                rows = slice(start, min(start + step, n_q))
                r, seen = rows.stop - start, max(0, min(n_k, rows.stop + offset)) if causal else n_k
                if seen == 0:
                    continue
                q = query[batch, groups, :, rows].float().reshape(-1, rep * r, d)
                x = buffer[: len(q) * rep * r * seen].view(len(q), rep * r, seen)
                whole = x.view(-1, groups.stop - g0, rep, r, seen)  # b g rep r seen
                minus = None if lse is None else lse[batch, groups, :, rows]
                if mask is not None:
                    bias = additive(part(mask, batch, groups, slice(None), rows, slice(seen))).mul_(LOG2E)
                    if minus is None:
                        whole.copy_(bias)
                    else:
                        torch.sub(bias.expand_as(whole), minus, out=whole)
                elif minus is not None:
                    whole.copy_(minus.neg())
                x.baddbmm_(q, k[:, :, :seen], beta=int(mask is not None or lse is not None), alpha=scaling * LOG2E)
                if causal and (first := max(0, start + offset)) < seen:
                    below = step + start + offset - first  # the row of `future` that stands for the first of this tile
                    whole[..., first:] += future[below : below + r, : seen - first]
                flat = (b0 * g + g0) * rep
                yield slice(flat, flat + len(q) * rep), rows, x.view(-1, r, seen)


def row_softmax_(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace base-2 logits by 2^(x - m), m the row maximum; returns (m, row sums), [..., 1]. Hidden rows sum to 0."""
    m = x.amax(-1, keepdim=True).clamp_min_(LOWEST)  # finite, so that -inf - m is no NaN
    x.sub_(m).exp2_()
    return m, x.sum(-1, keepdim=True)


@torch.no_grad()
def attention_lse_reference(query, key, *, scaling, mask=None, causal=False, chunk=CHUNK) -> torch.Tensor:
    """`attention_lse` in plain torch."""
    b, h, n_q, _ = query.shape
    out = torch.full((b * h, n_q), float("-inf"), device=query.device)
    for heads, rows, x in logit_tiles(query, key, scaling, mask, causal, chunk):
        m, total = row_softmax_(x)
        out[heads, rows] = (m + total.log2())[..., 0] / LOG2E
    return out.view(b, h, n_q)


if HAS_TRITON:

    @triton.jit
    def _lse_kernel(
        q_ptr,  # [b, h, n_q, d]
        k_ptr,  # [b, g, n_k, d]
        mask_ptr,  # [b|1, h|1, n_q|1, n_k], any strides
        out_ptr,  # [splits, b, h, n_q] natural log-sum-exp over the keys of a split
        q_sb, q_sh, q_sm, q_sd,
        k_sb, k_sh, k_sn, k_sd,
        mask_sb, mask_sh, mask_sm, mask_sn,
        heads, n_q, n_k, per_split,
        scale2,  # scaling * log2(e)
        hidden,  # additive mask entries at or below it hide
        REP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, MASK_BOOL: tl.constexpr, UPCAST: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """This program computes the log-sum-exp of BLOCK_M query rows of one head over the keys of one split."""
        head = tl.program_id(0)
        start, split = tl.program_id(1) * BLOCK_M, tl.program_id(2)
        b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
        rows, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        columns = tl.arange(0, BLOCK_N)
        q_at = q_ptr + b * q_sb + h * q_sh + rows.to(tl.int64)[:, None] * q_sm + d[None, :] * q_sd
        q = tl.load(q_at, mask=(rows[:, None] < n_q) & (d[None, :] < D), other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        k_base = k_ptr + b * k_sb + (h // REP) * k_sh
        mask_base = mask_ptr + b * mask_sb + h * mask_sh
        offset = n_k - n_q
        low = split * per_split  # a multiple of BLOCK_N
        high = tl.minimum(n_k, low + per_split)
        plain = high  # blocks below it lie wholly inside and are seen by every row
        if CAUSAL:
            high = tl.minimum(high, start + BLOCK_M + offset)
            plain = tl.minimum(plain, start + offset + 1)
        plain = tl.maximum(low, plain // BLOCK_N * BLOCK_N)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for phase in tl.static_range(2):  # first the blocks that need no bound, then the others
            begin = low if phase == 0 else plain
            end = plain if phase == 0 else high
            for n0 in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                cols = n0 + columns
                k_at = k_base + cols.to(tl.int64)[:, None] * k_sn + d[None, :] * k_sd
                if phase == 0:
                    k = tl.load(k_at, mask=d[None, :] < D, other=0.0)
                else:
                    k = tl.load(k_at, mask=(cols[:, None] < n_k) & (d[None, :] < D), other=0.0)
                if UPCAST:
                    k = k.to(tl.float32)
                x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
                if HAS_MASK:
                    at = mask_base + rows.to(tl.int64)[:, None] * mask_sm + cols.to(tl.int64)[None, :] * mask_sn
                    inside = (rows[:, None] < n_q) & (cols[None, :] < n_k)
                    if MASK_BOOL:
                        x = tl.where(tl.load(at, mask=inside, other=0) != 0, x, float("-inf"))
                    else:
                        bias = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                        x = tl.where(bias > hidden, x + bias * 1.4426950408889634, float("-inf"))
                if phase == 1:
                    visible = cols[None, :] < n_k
                    if CAUSAL:
                        visible = visible & (cols[None, :] <= rows[:, None] + offset)
                    x = tl.where(visible, x, float("-inf"))
                new = tl.maximum(m, tl.max(x, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)  # no key seen so far: -inf - 0, not -inf - -inf
                total = total * tl.exp2(m - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
                m = new
        out = (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453  # -inf where no key was seen
        at = out_ptr + (split.to(tl.int64) * tl.num_programs(0) + head) * n_q + rows
        tl.store(at, out, mask=rows < n_q)


def mask_arguments(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> tuple:
    """(tensor, strides of [b, h, n_q, n_k] with 0 where it is broadcast, the limit of hiding) as kernels want them."""
    if mask is None:
        return query, (0, 0, 0, 0), 0.0
    strides = mask.expand(*query.shape[:3], key.shape[2]).stride()
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), strides, 0.0
    return mask, strides, hidden_below(mask)


def blocks(d: int, itemsize: int, rows: int) -> dict[str, int]:
    """Block sizes by head dim, bytes of an element and rows of queries: one choice, no tuning at run time."""
    block_d = max(16, triton.next_power_of_2(d))
    wide = block_d * itemsize > 256  # beyond head dim 128 in 16 bits
    few = max(16, triton.next_power_of_2(rows))
    return {"BLOCK_D": block_d, "BLOCK_M": min(32 if wide else 64, few), "BLOCK_N": 64 if wide else 128}


def launch_lse(query, key, scaling, mask, causal) -> torch.Tensor:
    """`attention_lse` by the Triton kernel."""
    (b, h, n_q, d), (g, n_k) = query.shape, key.shape[1:3]
    if min(b, h, n_q, n_k) == 0:
        return torch.full((b, h, n_q), float("-inf"), device=query.device)
    sizes = blocks(d, query.element_size(), n_q)
    row_blocks, key_blocks = triton.cdiv(n_q, sizes["BLOCK_M"]), triton.cdiv(n_k, sizes["BLOCK_N"])
    # few rows would leave most of a GPU idle: then the keys are split over programs, and the parts are joined below
    wanted = 2 * (4 if INTERPRETED else torch.cuda.get_device_properties(query.device).multi_processor_count)
    splits = max(1, min(key_blocks, wanted // (b * h * row_blocks)))
    per_split = triton.cdiv(key_blocks, splits) * sizes["BLOCK_N"]
    parts = torch.empty(splits, b, h, n_q, device=query.device)
    mask_, mask_strides, hidden = mask_arguments(query, key, mask)
    _lse_kernel[(b * h, row_blocks, splits)](
        query, key, mask_, parts, *query.stride(), *key.stride(), *mask_strides, h, n_q, n_k, per_split,
        scaling * LOG2E, hidden, REP=h // g, D=d, **sizes, CAUSAL=causal, HAS_MASK=mask is not None,
        MASK_BOOL=mask is not None and mask.dtype == torch.bool, UPCAST=INTERPRETED, STAGES=2, num_warps=4,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.logsumexp(0)


@torch.no_grad()
def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Row log-sum-exp of the attention logits, in O(n) memory; no gradient flows.

    Args:
        query: [b, h, n_q, d].
        key: [b, g, n_k, d] with h a multiple of g.
        scaling: Factor on the logits.
        mask: Additive or boolean (True = visible), [b|1, h|1, n_q|1, n_k]. Additive entries of -inf, or of the most
            negative number of the dtype, hide.
        causal: Query row i sees keys up to i + n_k - n_q (the last rows of a longer context).
        chunk: Query rows the reference holds at once, over the heads that share a key head.

    Returns:
        [b, h, n_q] in fp32, natural logarithm; -inf for a row that sees nothing.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> q = k = torch.zeros(1, 2, 5, 8)
        >>> attention_lse(q, k, scaling=1.0).exp()[0, 0]
        tensor([5.0000, 5.0000, 5.0000, 5.0000, 5.0000])
    """
    check_attention(query, key, mask)
    if use_triton(query, key, mask):
        return launch_lse(query, key, scaling, mask, causal)
    return attention_lse_reference(query, key, scaling=scaling, mask=mask, causal=causal, chunk=chunk)


STRIDES = ("q_sb", "q_sh", "q_sm", "k_sb", "k_sh", "k_sn", "mask_sb", "mask_sh", "mask_sm")


def compile_specs() -> list[CompileSpec]:
    """The specialisations that the tests build: head dims 64 to 256, causal, each kind of mask."""
    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "out_ptr": "*fp32", "scale2": "fp32", "hidden": "fp32"}
    types |= dict.fromkeys((*STRIDES, "heads", "n_q", "n_k", "per_split"), "i32")
    common = {"q_sd": 1, "k_sd": 1, "mask_sn": 1, "REP": 4, "UPCAST": False, "STAGES": 2}
    return [
        CompileSpec(
            _lse_kernel,
            types | {"mask_ptr": "*u8" if boolean else "*bf16"},
            common | blocks(d, 2, rows) | {"D": d, "CAUSAL": causal, "HAS_MASK": has_mask, "MASK_BOOL": boolean},
        )
        for d, rows, causal, has_mask, boolean in (
            (128, 4096, False, False, False), (128, 4096, True, False, False), (128, 64, True, True, True),
            (64, 1, False, True, False), (80, 4096, True, True, True), (256, 4096, True, False, False),
        )
    ]  # fmt: skip
