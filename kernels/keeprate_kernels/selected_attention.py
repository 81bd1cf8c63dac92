"""Attention of a few query rows over chosen keys only, read where they lie: one decode step of a sparse cache.

With I the positions chosen for a KV head (or the segment of a flat cache that is the head's own), for every query row q

    s_j = scaling * <q, k_j> + bias_j,  j in I        lse = log sum_j exp(s_j)        out = sum_j exp(s_j - lse) v_j

The sum is split over j. Parts (out_i, lse_i) over disjoint sets of keys merge exactly:

    lse = log sum_i exp(lse_i)                         out = sum_i exp(lse_i - lse) out_i

Query heads that share a KV head are stacked as rows, so keys are never repeated. Time follows |I|, not n.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from keeprate_kernels.compact_kv import check_positions, gather_rows
from keeprate_kernels.runtime import HAS_TRITON, INTERPRETED, CompileSpec, tl, triton, use_triton

CHUNK = 128  # tokens of a block in the ragged reference: fastest of 32 to 256 for 4 to 32 heads of about 1000 tokens
WASTE = 1.5  # longest segment / mean up to which the reference pads: blocks were slower at 1.2, even at 1.7
SPLIT = 128  # least number of keys worth a program of its own
MAX_SPLITS = 64
LOG2E = 1.4426950408889634
INTEGERS = (torch.int32, torch.int64)

if HAS_TRITON:

    @triton.jit
    def selected_attention_kernel(
        q_ptr, k_ptr, v_ptr, index_ptr, offsets_ptr, valid_ptr, bias_ptr, out_ptr, lse_ptr, scaling,
        g, group, m, n, count, d, splits, total,
        q_b, q_h, q_m, q_d, k_b, k_g, k_n, k_d, v_b, v_g, v_n, v_d, index_b, index_g, index_k,
        valid_b, valid_g, valid_k, bias_b, bias_g, bias_h, bias_m, bias_k, LOG2E: tl.constexpr,
        HAS_INDEX: tl.constexpr, RAGGED: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_LSE: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """This program attends with BLOCK_M query rows of one KV head to one of `splits` parts of the head's keys.

        q [b, g * group, m, d]; k, v [b, g, n, d] with index [b, g, count] (HAS_INDEX), or [t, d] with offsets
        [b * g + 1] (RAGGED); valid bytes like index, or [t]; bias [b, g, group, m, count]; out [splits, total, d] and
        lse [splits, total] fp32, both contiguous, total = b * g * group * m.
        """
        rows = group * m
        blocks = tl.cdiv(rows, BLOCK_M)
        segment = (tl.program_id(0) // blocks).to(tl.int64)
        batch, head = segment // g, segment % g
        row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        member, query = row // m, row % m
        channel = tl.arange(0, BLOCK_D)
        q_row = q_ptr + batch * q_b + (head * group + member) * q_h + query * q_m
        q = tl.load(
            q_row[:, None] + channel[None, :] * q_d, mask=(row < rows)[:, None] & (channel < d)[None, :], other=0.0
        )
        if UPCAST:
            q = q.to(tl.float32)
        first = segment * 0
        here = count
        if RAGGED:
            first = tl.load(offsets_ptr + segment)
            here = (tl.load(offsets_ptr + segment + 1) - first).to(tl.int32)
        k_ptr += batch * k_b + head * k_g
        v_ptr += batch * v_b + head * v_g
        if HAS_INDEX:
            index_ptr += batch * index_b + head * index_g
        if HAS_VALID:
            valid_ptr += batch * valid_b + head * valid_g
        if HAS_BIAS:
            bias_row = bias_ptr + batch * bias_b + head * bias_g + member.to(tl.int64) * bias_h + query * bias_m
        part = tl.cdiv(tl.cdiv(here, splits), BLOCK_N) * BLOCK_N
        start = tl.program_id(1) * part
        stop = tl.minimum(start + part, here)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for at in range(start, stop, BLOCK_N):
            column = at + tl.arange(0, BLOCK_N)
            there = column < stop
            if HAS_VALID:
                place = (first + column) * valid_k
                there = there & (tl.load(valid_ptr + place, mask=there, other=0) != 0)
            if HAS_INDEX:
                token = tl.load(index_ptr + column.to(tl.int64) * index_k, mask=there, other=0).to(tl.int64)
                there = there & (token >= 0) & (token < n)
            else:
                token = first + column
            inside = there[:, None] & (channel < d)[None, :]
            k = tl.load(k_ptr + token[:, None] * k_n + channel[None, :] * k_d, mask=inside, other=0.0)
            v = tl.load(v_ptr + token[:, None] * v_n + channel[None, :] * v_d, mask=inside, other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2E)
            if HAS_BIAS:
                inside = (row < rows)[:, None] & there[None, :]
                s += (
                    tl.load(bias_row[:, None] + column[None, :] * bias_k, mask=inside, other=0.0).to(tl.float32) * LOG2E
                )
            s = tl.where(there[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - level[:, None])
            decay = tl.exp2(top - level)
            norm = norm * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            top = higher
        norm = tl.where(norm == 0.0, 1.0, norm)  # nothing to see: 0, and the log-sum-exp is top = -inf
        acc /= norm[:, None]
        place = tl.program_id(1).to(tl.int64) * total + segment * rows + row
        inside = (row < rows)[:, None] & (channel < d)[None, :]
        tl.store(out_ptr + place[:, None] * d + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
        if HAS_LSE:
            tl.store(lse_ptr + place, (top + tl.log2(norm)) / LOG2E, mask=row < rows)

    @triton.jit
    def merge_attention_kernel(
        part_ptr, lse_ptr, out_ptr, out_lse_ptr, total, d, splits,
        HAS_LSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """This program merges the parts of one query row: part [splits, total, d], lse [splits, total], contiguous."""
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK_S).to(tl.int64) * total + row
        channel = tl.arange(0, BLOCK_D)
        lse = tl.load(lse_ptr + place, mask=tl.arange(0, BLOCK_S) < splits, other=float("-inf"))
        top = tl.max(lse, 0)
        level = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp(lse - level)
        norm = tl.sum(weight, 0)
        norm = tl.where(norm == 0.0, 1.0, norm)
        inside = (weight > 0)[:, None] & (channel < d)[None, :]
        part = tl.load(part_ptr + place[:, None] * d + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        out = tl.sum(part * weight[:, None], 0) / norm
        tl.store(out_ptr + row * d + channel, out.to(out_ptr.dtype.element_ty), mask=channel < d)
        if HAS_LSE:
            tl.store(out_lse_ptr + row, top + tl.log(norm))


def _blocks(rows: int, d: int, itemsize: int) -> dict[str, int]:
    """Tile sizes: all rows of a decode step in one block, 16 KiB of keys at a time."""
    block_d = max(16, 1 << (d - 1).bit_length())
    block_n = max(16, min(64, 16384 // (block_d * itemsize)))
    return {"BLOCK_M": max(16, min(64, 1 << (rows - 1).bit_length())), "BLOCK_N": block_n, "BLOCK_D": block_d}


def _splits(programs: int, keys: int, device: torch.device) -> int:
    """Parts of a head's keys: enough programs for two on every multiprocessor, if the keys suffice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(-(-2 * processors // programs), -(-keys // SPLIT), MAX_SPLITS))


def _launch(query, key, value, index, offsets, valid, bias, scaling, return_lse):
    """Both kernels' launcher: ragged with `offsets`, else dense: index, valid [b, g, k], bias [b, g, group, m, k]."""
    b, h, m, d = query.shape
    ragged = offsets is not None
    g = (len(offsets) - 1) // b if ragged else key.shape[1]
    n = key.shape[0 if ragged else 2]
    count = n if index is None else index.shape[2]
    total = b * h * m
    blocks = _blocks(h // g * m, d, key.element_size())
    programs = b * g * triton.cdiv(h // g * m, blocks["BLOCK_M"])
    # a ragged head's mean, doubled: longer heads should not become the critical path; empty parts end at once
    splits = _splits(programs, min(count, -(-2 * count // (b * g))) if ragged else count, query.device)
    out = query.new_empty(b, h, m, d)
    lse = query.new_empty(b, h, m, dtype=torch.float32) if return_lse else None
    parts, norms = out, lse
    if splits > 1:
        parts = query.new_empty(splits, total, d, dtype=torch.float32)
        norms = query.new_empty(splits, total, dtype=torch.float32)
    valid = None if valid is None else valid.view(torch.uint8)
    strides = [(0, 0, *x.stride()) if ragged else x.stride() for x in (key, value)]
    strides += [(0, 0, 0) if index is None else index.stride()]
    strides += [(0, 0, 0) if valid is None else (0, 0, *valid.stride()) if ragged else valid.stride()]
    strides += [(0,) * 5 if bias is None else bias.stride()]
    selected_attention_kernel[(programs, splits)](
        query, key, value, index, offsets, valid, bias, parts, norms, scaling,
        g, h // g, m, n, count, d, splits, total, *query.stride(), *(step for x in strides for step in x), LOG2E,
        HAS_INDEX=index is not None, RAGGED=ragged, HAS_VALID=valid is not None, HAS_BIAS=bias is not None,
        HAS_LSE=norms is not None, UPCAST=INTERPRETED, **blocks, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _launch_merge(parts, norms, out, lse)
    return out, lse


def _launch_merge(parts: torch.Tensor, norms: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Merge parts [splits, ..., d] with norms [splits, ...] into out and lse; all contiguous."""
    d, splits, total = out.shape[-1], len(parts), out.numel() // out.shape[-1]
    merge_attention_kernel[(total,)](
        parts, norms, out, lse, total, d, splits, HAS_LSE=lse is not None,
        BLOCK_S=1 << (splits - 1).bit_length(), BLOCK_D=1 << (d - 1).bit_length(), num_warps=4,
    )  # fmt: skip


def selected_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: gather whole rows, stack the query heads of a KV head, attend. Arguments as `selected_attention`."""
    (b, h, m, d), g = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    if index is not None:
        index = index.expand(b, g, -1)
        if valid is not None:  # padding reads what the head reads anyway: its own positions and numbers do not matter
            any_token = index.gather(2, valid.expand(b, g, -1).to(torch.uint8).argmax(-1, keepdim=True))
            index = torch.where(valid, index, any_token * valid.any(-1, keepdim=True))
        check_positions(index, key.shape[2])
        key, value = gather_rows(key, value, index, torch.arange(b * g, device=key.device).view(b, g, 1))
    rows = query.reshape(b, g, h // g * m, d)  # b g r d
    seen = None if valid is None else valid[:, :, None]  # b g 1 k
    mask = seen
    if bias is not None:
        mask = _bias(bias, b, g, h, m).expand(b, g, h // g, m, -1).reshape(b, g, h // g * m, -1).to(wide)
        mask = mask if seen is None else mask.masked_fill(~seen, float("-inf"))
        seen = mask > float("-inf")
    if not return_lse:
        mask = mask if bias is None else mask.to(query.dtype)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        if seen is not None:
            out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        return out.reshape(b, h, m, d)
    logits = (rows.to(wide) * scaling) @ key.to(wide).mT  # b g r k
    if bias is not None:
        logits = logits + mask
    elif mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    probs = (logits - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    out = (probs @ value.to(wide)).to(query.dtype)
    return out.reshape(b, h, m, d), lse.reshape(b, h, m)


def ragged_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: segments cut into blocks of `CHUNK` tokens, one batched product, blocks summed per segment.

    At most one block a segment is padded, however the lengths differ. Segments of much the same length are padded to
    the longest instead, and those of the same length are a view. Arguments as `ragged_attention`.
    """
    b, h, m, d = query.shape
    wide, device = torch.promote_types(query.dtype, torch.float32), query.device
    counts, s, token = offsets.diff(), len(offsets) - 1, None
    longest = int(counts.max())
    if longest * s <= WASTE * len(key):
        shape, options = (b, s // b, longest), {"scaling": scaling, "return_lse": return_lse}
        if longest * s == len(key):
            key, value = key.unflatten(0, shape), value.unflatten(0, shape)
            there = None if valid is None else valid.view(shape)
            return selected_attention_reference(query, key, value, None, valid=there, **options)
        place = torch.arange(longest, device=device)
        there = place < counts[:, None]
        row = torch.where(there, offsets[:-1, None] + place, 0)
        there = there if valid is None else there & valid[row]
        key, value = (x.expand(*shape[:2], -1, -1) for x in (key, value))
        return selected_attention_reference(query, key, value, row.view(shape), valid=there.view(shape), **options)
    if valid is not None:  # what is not there is left out, as if the segments were shorter
        token = valid.nonzero().view(-1)
        offsets = F.pad(valid.cumsum(0), (1, 0))[offsets]
        counts = offsets.diff()
    rows = query.reshape(s, -1, d).to(wide) * scaling  # s r d
    r = rows.shape[1]
    size = max(1, min(CHUNK, int(counts.max())))
    blocks = (counts + size - 1) // size
    number = int(blocks.sum())
    segment = torch.arange(s, device=device).repeat_interleave(blocks, output_size=number)
    place = torch.arange(number, device=device) - (blocks.cumsum(0) - blocks)[segment]
    stop = offsets[1:][segment, None]
    token_of = (offsets[:-1][segment] + size * place)[:, None] + torch.arange(size, device=device)  # blocks size
    beyond = token_of >= stop
    token_of = torch.minimum(token_of, stop - 1).view(-1)
    token_of = token_of if token is None else token[token_of]
    keys, values = (x.index_select(0, token_of).view(number, size, d).to(wide) for x in (key, value))
    logits = torch.bmm(rows.index_select(0, segment), keys.mT)  # blocks r size
    logits = logits.masked_fill_(beyond[:, None], float("-inf"))
    with torch.no_grad():  # the result does not depend on it
        top = logits.new_full((s, r), float("-inf"))
        top = top.scatter_reduce_(0, segment[:, None].expand(number, r), logits.amax(-1), "amax")
    probs = logits.sub_(top.index_select(0, segment)[..., None]).exp_()
    norm = logits.new_zeros(s, r).index_add_(0, segment, probs.sum(-1))
    out = logits.new_zeros(s, r, d).index_add_(0, segment, torch.bmm(probs, values))
    out = (out / norm.masked_fill(norm == 0, 1.0)[..., None]).to(query.dtype).view(b, h, m, d)
    return (out, (top + norm.log()).view(b, h, m)) if return_lse else out


def merge_attention_reference(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, of stacked parts [p, ..., d] and log-sum-exps [p, ...]."""
    lse = lses.logsumexp(0)
    weight = (lses - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    part = outs.to(torch.promote_types(outs.dtype, lses.dtype)).masked_fill((weight == 0)[..., None], 0.0)
    return (part * weight[..., None]).sum(0).to(outs.dtype), lse


def _bias(bias: torch.Tensor, b: int, g: int, h: int, m: int) -> torch.Tensor:
    """Bias [b, g|h|1, 1|m, k] as [b, g|1, h // g|1, 1|m, k], a view."""
    heads = bias.shape[1]
    return bias.unflatten(1, (g, h // g)) if heads == h else bias[:, :, None]


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether the reference has to run although there is a GPU: gradients, or float64."""
    given = [t for t in tensors if t is not None]
    return (torch.is_grad_enabled() and any(t.requires_grad for t in given)) or given[0].dtype == torch.float64


def _check(query, key, value, flat):
    dims, shape = (2, "[tokens, dim]") if flat else (4, "[batch, heads, tokens, dim]")
    if query.dim() != 4 or 0 in query.shape or not query.is_floating_point():
        raise ValueError(f"query must be floating, [batch, heads, rows, dim], and not empty; got {query.dtype} "
                         f"{tuple(query.shape)}")  # fmt: skip
    fits = key.dim() == dims and key.shape[-1] == query.shape[3]
    if not fits or key.shape != value.shape or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"key and value must be {shape} with dim {query.shape[3]} and {query.dtype}; got {key.dtype} "
                         f"{tuple(key.shape)} and {value.dtype} {tuple(value.shape)}")  # fmt: skip
    if not flat and (key.shape[0] != query.shape[0] or key.shape[1] == 0 or query.shape[1] % key.shape[1]):
        raise ValueError("query and key must agree in batch, and query heads must be a multiple of key heads; got "
                         f"{tuple(query.shape)} and {tuple(key.shape)}")  # fmt: skip


def _nothing(query: torch.Tensor, return_lse: bool) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention to no key at all."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    wide = torch.promote_types(query.dtype, torch.float32)
    return (out, query.new_full(query.shape[:3], float("-inf"), dtype=wide)) if return_lse else out


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of few query rows to an index list per KV head; every row sees every chosen key.

    Args:
        query: [b, h, m, d], m = 1 in a decode step.
        key, value: [b, g, n, d] with h a multiple of g (grouped-query attention), any strides.
        index: [b, g, k] or [b, 1, k] positions in 0..n-1, in any order (a repeated one counts twice); None = all n.
        scaling: Factor on the logits, usually d ** -0.5.
        valid: [b, g, k] or [b, 1, k] boolean, False = padding, whose position may be anything; None = all.
        bias: Added to the logits, [b, g or h or 1, m or 1, k]; None = none.
        return_lse: Whether the log-sum-exp of the logits is returned too, for `merge_attention`.

    Returns:
        [b, h, m, d] in query's dtype; rows that see nothing are 0. With `return_lse` also [b, h, m] in fp32 (in
        float64 for such inputs), -inf where nothing is seen. Gradients flow (through the plain-torch path) where an
        input asks for them.

    Raises:
        ValueError: If shapes or dtypes do not fit, or (read on a CPU only) a position is out of range. On a GPU a
            position out of range counts as padding.

    Source: split keys and merge as Flash-Decoding (Dao et al., 2023); reading through an index list as in TidalDecode
        (2410.05076).

    Example:
        >>> q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 100, 8)
        >>> selected_attention(q, k, k, torch.tensor([[[0, 7, 99]]]), scaling=8**-0.5).shape
        torch.Size([1, 4, 1, 8])
    """
    _check(query, key, value, flat=False)
    (b, h, m, _), (_, g, n, _) = query.shape, key.shape
    if index is not None and (
        index.dim() != 3 or index.shape[0] != b or index.shape[1] not in (1, g) or index.dtype not in INTEGERS
    ):
        raise ValueError(f"index must be int32 or int64 [{b}, {g} or 1, k]; got {index.dtype} {tuple(index.shape)}")
    k = n if index is None else index.shape[2]
    if valid is not None and (
        valid.dtype != torch.bool or valid.dim() != 3 or valid.shape[1] not in (1, g) or valid.shape[::2] != (b, k)
    ):
        raise ValueError(f"valid must be boolean [{b}, {g} or 1, {k}]; got {valid.dtype} {tuple(valid.shape)}")
    if bias is not None:
        shape = bias.shape
        fits = bias.dim() == 4 and shape[0] == b and shape[1] in (1, g, h) and shape[2] in (1, m) and shape[3] == k
        if not fits or not bias.is_floating_point():
            raise ValueError(f"bias must be floating [{b}, {g} or {h} or 1, {m} or 1, {k}]; got {bias.dtype} "
                             f"{tuple(shape)}")  # fmt: skip
    if k == 0 or n == 0:
        return _nothing(query, return_lse)
    if _plain(query, key, value, bias) or not use_triton(query, key, value, index, valid, bias):
        options = {"scaling": scaling, "valid": valid, "bias": bias, "return_lse": return_lse}
        return selected_attention_reference(query, key, value, index, **options)
    index, valid = (None if x is None else x.expand(b, g, k) for x in (index, valid))
    bias = None if bias is None else _bias(bias, b, g, h, m).expand(b, g, h // g, m, k)
    out, lse = _launch(query, key, value, index, None, valid, bias, scaling, return_lse)
    return (out, lse) if return_lse else out


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of few query rows to flat keys, of which every KV head owns a segment of its own length.

    Args:
        query: [b, h, m, d].
        key, value: [t, d], head after head.
        offsets: [b * g + 1]; segment i (sample i // g, KV head i % g) is rows offsets[i] to offsets[i + 1].
        scaling: Factor on the logits.
        valid: [t] boolean, False = not to be seen; None = all.
        return_lse: Whether the log-sum-exp of the logits is returned too, for `merge_attention`.

    Returns:
        As `selected_attention`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or (read on a CPU only) offsets do not rise from 0 to t.

    Source: per-head budgets as in Ada-KV (2407.11550); the flat layout is that of variable-length flash attention.
    """
    _check(query, key, value, flat=True)
    b, h, t = *query.shape[:2], len(key)
    g = (offsets.numel() - 1) // b
    if offsets.dim() != 1 or offsets.numel() != b * g + 1 or g == 0 or h % g or offsets.dtype not in INTEGERS:
        raise ValueError(f"offsets must be int32 or int64 [{b} * g + 1] with {h} query heads a multiple of g; got "
                         f"{offsets.dtype} {tuple(offsets.shape)}")  # fmt: skip
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (t,)):
        raise ValueError(f"valid must be boolean [{t}]; got {valid.dtype} {tuple(valid.shape)}")
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != t or bool((offsets.diff() < 0).any())):
        raise ValueError(f"offsets must rise from 0 to {t}; got {offsets.tolist()}")
    if t == 0:
        return _nothing(query, return_lse)
    if _plain(query, key, value) or not use_triton(query, key, value, offsets, valid):
        options = {"scaling": scaling, "valid": valid, "return_lse": return_lse}
        return ragged_attention_reference(query, key, value, offsets, **options)
    out, lse = _launch(query, key, value, None, offsets, valid, None, scaling, return_lse)
    return (out, lse) if return_lse else out


def merge_attention(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention to a union of disjoint sets of keys, from the attention to each (near and far tokens, say).

    Args:
        outs: Tensors [b, h, m, d], one a set.
        lses: Their log-sum-exps [b, h, m] in fp32, as `selected_attention` returns them.
        return_lse: Whether that of the union is returned too.

    Returns:
        [b, h, m, d] in the first part's dtype; 0 where no set holds a visible key. With `return_lse` also [b, h, m].

    Raises:
        ValueError: If there is no part, or shapes differ.
    """
    shapes = [tuple(x.shape) for x in (*outs, *lses)]
    if not len(outs) or len(outs) != len(lses) or set(shapes) != {tuple(outs[0].shape), tuple(outs[0].shape[:-1])}:
        raise ValueError(f"outs and lses must be equally many, [b, h, m, d] and [b, h, m], all alike; got {shapes}")
    parts, norms = torch.stack([x.to(outs[0].dtype) for x in outs]), torch.stack(list(lses))
    if _plain(parts, norms) or not use_triton(parts, norms):
        out, lse = merge_attention_reference(parts, norms)
    else:
        out, lse = torch.empty_like(parts[0]), torch.empty_like(norms[0]) if return_lse else None
        _launch_merge(parts, norms, out, lse)
    return (out, lse) if return_lse else out


def compile_specs() -> list[CompileSpec]:
    """A decode step over an index list, 64 rows with padding and bias, fp32, a flat cache; both kinds of merge."""
    sizes = dict.fromkeys(("g", "group", "m", "n", "count", "d", "splits", "total"), "i32") | {"scaling": "fp32"}
    sizes |= dict.fromkeys([f"{x}_{axis}" for x, axes in (("q", "bhm"), ("k", "bgn"), ("v", "bgn"), ("index", "bg"),
                            ("valid", "bg"), ("bias", "bghm")) for axis in axes], "i32")  # fmt: skip
    ones = dict.fromkeys(("q_d", "k_d", "v_d", "index_k", "valid_k", "bias_k"), 1)
    specs = []
    for kind, itemsize, rows, d, part, given in (
        ("*bf16", 2, 4, 128, "*fp32", ("index",)), ("*bf16", 2, 64, 128, "*bf16", ("index", "valid", "bias")),
        ("*bf16", 2, 8, 256, "*fp32", ("index", "valid")), ("*fp32", 4, 4, 64, "*fp32", ("index", "bias")),
        ("*bf16", 2, 4, 128, "*fp32", ("offsets", "valid")),
    ):  # fmt: skip
        kinds = {"index": "*i64", "offsets": "*i64", "valid": "*u8", "bias": kind}
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), kind) | {"out_ptr": part, "lse_ptr": "*fp32"}
        pointers |= {f"{name}_ptr": kinds[name] for name in given}
        flags = {"HAS_INDEX": "index" in given, "RAGGED": "offsets" in given, "HAS_VALID": "valid" in given}
        flags |= {"HAS_BIAS": "bias" in given, "HAS_LSE": True, "UPCAST": False, "LOG2E": LOG2E}
        absent = {f"{name}_ptr": None for name in kinds if name not in given}
        constexprs = ones | flags | absent | _blocks(rows, d, itemsize)
        specs.append(CompileSpec(selected_attention_kernel, sizes | pointers, constexprs, num_warps=4, num_stages=2))
    for part in ("*fp32", "*bf16"):
        signature = {"part_ptr": part, "lse_ptr": "*fp32", "out_ptr": "*bf16", "out_lse_ptr": "*fp32"}
        signature |= dict.fromkeys(("total", "d", "splits"), "i32")
        constexprs = {"HAS_LSE": True, "BLOCK_S": MAX_SPLITS, "BLOCK_D": 128}
        specs.append(CompileSpec(merge_attention_kernel, signature, constexprs, num_warps=4, num_stages=1))
    return specs
