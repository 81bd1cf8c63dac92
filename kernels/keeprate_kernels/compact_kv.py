"""Keys and values of the tokens that stay, moved together: one launch for both tensors and all heads.

Dense, the same number for every head:          out[b, g, j] = x[b, g, index[b, g, j]]
Ragged, a number of its own for every head:     out[offset(b, g) + j] = x[b, g, index[offset(b, g) + j]]

with offset(b, g) = sum of the counts of the heads before. In place the rows of a head move towards its front. Sorted
positions satisfy index[j] >= j, so whoever moves rows in the order of j never overwrites one that is still needed.
"""

import math

import torch

from keeprate_kernels.runtime import HAS_TRITON, CompileSpec, tl, triton, use_triton

IN_PLACE_BYTES = 64  # of a row that one program moves in place: two sectors of a GPU's memory

if HAS_TRITON:

    @triton.jit
    def compact_kv_kernel(
        key_ptr, value_ptr, index_ptr, offsets_ptr, out_key_ptr, out_value_ptr, g, n, k, d,
        key_b, key_g, key_n, key_d, value_b, value_g, value_n, value_d, index_b, index_g, index_k,
        out_key_b, out_key_g, out_key_n, out_key_d, out_value_b, out_value_g, out_value_n, out_value_d,
        RAGGED: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """This program moves BLOCK_D channels of the rows at, at + programs * BLOCK_N, ... of one head.

        key, value [b, g, n, d]; index [b, g, k], or flat [t] with offsets [b * g + 1] (RAGGED); outputs [b, g, k, d]
        or [t, d] (their b and g strides are then 0). IN_PLACE outputs are the inputs and one program walks a head.
        """
        segment = tl.program_id(1).to(tl.int64)
        batch, head = segment // g, segment % g
        channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        index_ptr += batch * index_b + head * index_g
        key_ptr += batch * key_b + head * key_g
        value_ptr += batch * value_b + head * value_g
        out_key_ptr += batch * out_key_b + head * out_key_g
        out_value_ptr += batch * out_value_b + head * out_value_g
        count = k
        if RAGGED:
            first = tl.load(offsets_ptr + segment)
            count = (tl.load(offsets_ptr + segment + 1) - first).to(tl.int32)
            index_ptr += first * index_k
            out_key_ptr += first * out_key_n
            out_value_ptr += first * out_value_n
        for at in range(tl.program_id(0) * BLOCK_N, count, tl.num_programs(0) * BLOCK_N):
            column = (at + tl.arange(0, BLOCK_N)).to(tl.int64)
            token = tl.load(index_ptr + column * index_k, mask=column < count, other=0).to(tl.int64)
            inside = (column < count) & (token >= 0) & (token < n)  # never outside the tensor, checked or not
            source, target = (
                inside[:, None] & (channel < d)[None, :],
                (column < count)[:, None] & (channel < d)[None, :],
            )
            key = tl.load(key_ptr + token[:, None] * key_n + channel[None, :] * key_d, mask=source, other=0.0)
            value = tl.load(value_ptr + token[:, None] * value_n + channel[None, :] * value_d, mask=source, other=0.0)
            if IN_PLACE:
                tl.debug_barrier()  # all warps have read this block before any of them writes into it
            tl.store(out_key_ptr + column[:, None] * out_key_n + channel[None, :] * out_key_d, key, mask=target)
            tl.store(out_value_ptr + column[:, None] * out_value_n + channel[None, :] * out_value_d, value, mask=target)


def _blocks(d: int, itemsize: int, in_place: bool) -> dict[str, int]:
    """Tile sizes: 8 KiB of keys in flight; in place few channels, so that a head still has several programs."""
    most = IN_PLACE_BYTES // itemsize if in_place else 128
    block_d = min(1 << (d - 1).bit_length(), most)
    return {"BLOCK_N": max(16, min(256, 8192 // (block_d * itemsize))), "BLOCK_D": block_d}


def _launch(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, counts: torch.Tensor | None, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launcher; arguments as `compact_kv`, dense index expanded to all heads."""
    (b, g, n, d), ragged, offsets = key.shape, counts is not None, None
    k = index.shape[-1]
    if ragged:
        offsets = torch.nn.functional.pad(counts.reshape(-1).to(torch.int64).cumsum(0), (1, 0))
        out = [x.new_empty(k, d) for x in (key, value)]
        strides = [(0, 0, *x.stride()) for x in out]
        index_strides = (0, 0, *index.stride())
    else:
        out = [x[:, :, :k] if in_place else x.new_empty(b, g, k, d) for x in (key, value)]
        strides = [x.stride() for x in out]
        index_strides = index.stride()
    if k:
        blocks = _blocks(d, key.element_size(), in_place)
        rows = -(-k // (b * g)) if ragged else k  # a head's mean; a longer head makes its programs walk on
        programs = 1 if in_place else triton.cdiv(rows, blocks["BLOCK_N"])
        compact_kv_kernel[(programs, b * g, triton.cdiv(d, blocks["BLOCK_D"]))](
            key, value, index, offsets, *out, g, n, k, d,
            *key.stride(), *value.stride(), *index_strides, *strides[0], *strides[1],
            RAGGED=ragged, IN_PLACE=in_place, **blocks, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out[0], out[1]


def gather_rows(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, segment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both tensors [b, g, n, d] at positions `index` in the heads `segment` (= batch * g + head), in torch.

    Args:
        key, value: [b, g, n, d], any strides.
        index: [...] positions.
        segment: Heads, broadcastable to `index`.

    Returns:
        Both [..., d], copies.
    """
    g, d = key.shape[1], key.shape[3]
    batch, head = segment // g, segment % g
    taken, rows, known = [], None, None
    for x in (key, value):
        unit = math.gcd(*x.stride()[:3])
        if x.stride(3) != 1 or unit == 0 or x.requires_grad:
            taken.append(x[batch, head, index])
            continue
        # index_select copies whole rows, 20 times faster than gather at d = 128: number the rows of the storage
        if known != x.stride():
            known = x.stride()
            rows = index * (known[2] // unit) + (batch * (known[0] // unit) + head * (known[1] // unit))
        last = sum((size - 1) * (step // unit) for size, step in zip(x.shape[:3], known[:3], strict=True))
        flat = x.as_strided((last + 1, d), (unit, 1))
        taken.append(flat.index_select(0, rows.reshape(-1)).view(*index.shape, d))
    return taken[0], taken[1]


def compact_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, by whole rows. In place it needs room for the kept rows in passing. Arguments as `compact_kv`."""
    b, g = key.shape[:2]
    heads = torch.arange(b * g, device=key.device)
    if counts is not None:
        return gather_rows(key, value, index, heads.repeat_interleave(counts.reshape(-1), output_size=len(index)))
    index = index.expand(b, g, -1)
    kept = gather_rows(key, value, index, heads.view(b, g, 1))
    if not in_place:
        return kept
    k = index.shape[2]
    return key[:, :, :k].copy_(kept[0]), value[:, :, :k].copy_(kept[1])


def check_positions(index: torch.Tensor, n: int, increasing: bool = False) -> None:
    """Read the positions and raise a ValueError where one is not in 0..n-1 or, if asked, does not exceed the last."""
    if index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= n:
        raise ValueError(f"index must hold positions in 0..{n - 1}; got {int(low)}..{int(high)}")
    if increasing and bool((index.diff(dim=-1) <= 0).any()):
        raise ValueError("in_place needs positions that increase within every head; got unsorted or repeated ones")


def _check(key, value, index, counts, in_place, check):
    if key.dim() != 4 or key.shape != value.shape or 0 in (*key.shape[:2], key.shape[3]):
        raise ValueError(f"key and value must be alike, [batch, heads, tokens, dim], and not empty; got "
                         f"{tuple(key.shape)} and {tuple(value.shape)}")  # fmt: skip
    if key.dtype != value.dtype:
        raise ValueError(f"key and value must have one dtype; got {key.dtype} and {value.dtype}")
    b, g, n, _ = key.shape
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must hold int32 or int64 positions; got {index.dtype}")
    if counts is None:
        if index.dim() != 3 or index.shape[0] != b or index.shape[1] not in (1, g):
            raise ValueError(f"index must be [{b}, {g} or 1, k]; got {tuple(index.shape)}")
    elif index.dim() != 1 or counts.shape != (b, g) or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"with counts, index must be flat and counts integers [{b}, {g}]; got {tuple(index.shape)} "
                         f"and {counts.dtype} {tuple(counts.shape)}")  # fmt: skip
    if in_place:
        if counts is not None:
            raise ValueError("in_place needs as many tokens for every head; got counts: flat rows of one head would "
                             "land on rows of another that are not read yet")  # fmt: skip
        if key.requires_grad or value.requires_grad or any(s == 0 for x in (key, value) for s in x.stride()):
            raise ValueError("in_place needs key and value of their own memory, without gradient; got one that is "
                             "expanded or requires grad")  # fmt: skip
    if key.device.type == "cpu" if check is None else check:
        check_positions(index, n, increasing=in_place)
        if counts is not None and (int(counts.sum()) != len(index) or bool((counts < 0).any())):
            raise ValueError(f"counts must sum to the {len(index)} positions of index; got {int(counts.sum())}")


def compact_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    in_place: bool = False,
    check: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the kept tokens, gathered together.

    Args:
        key, value: [b, g, n, d], any strides, one dtype.
        index: Positions to keep, [b, g, k] or [b, 1, k] for all heads; with `counts` flat [t], head after head.
        counts: [b, g] tokens every head keeps, summing to t; None = k each.
        in_place: Move rows to the front of `key` and `value` and return views of them; the rows behind keep their old
            content. Needs positions that increase within every head. On a GPU no memory is needed and a head is moved
            by few programs, so it is slower than a copy; use it where a second cache would not fit.
        check: Whether positions are read and tested, which on a GPU waits for it. None = on a CPU only. Unchecked, a
            wrong position gives an unspecified row, never an access outside the tensors.

    Returns:
        (keys, values): [b, g, k, d] each; with `counts` [t, d] each.

    Raises:
        ValueError: If shapes do not fit, positions are out of range (or, in place, unsorted or repeated), or counts
            are combined with `in_place`.

    Example:
        >>> x = torch.arange(8.0).view(1, 2, 4, 1)
        >>> compact_kv(x, x, torch.tensor([1, 3, 0]), counts=torch.tensor([[2, 1]]))[0].view(-1)
        tensor([1., 3., 4.])
    """
    _check(key, value, index, counts, in_place, check)
    needs_grad = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if needs_grad or not use_triton(key, value, index, counts):
        return compact_kv_reference(key, value, index, counts=counts, in_place=in_place)
    index = index if counts is not None else index.expand(key.shape[0], key.shape[1], -1)
    return _launch(key, value, index, counts, in_place)


def compile_specs() -> list[CompileSpec]:
    """A copy of an 8-head cache, the same in place, and ragged heads."""
    sizes = dict.fromkeys(("g", "n", "k", "d"), "i32")
    strides = [f"{x}_{axis}" for x in ("key", "value", "out_key", "out_value") for axis in "bgn"]
    sizes |= dict.fromkeys((*strides, "index_b", "index_g"), "i32")
    ones = dict.fromkeys(("key_d", "value_d", "out_key_d", "out_value_d", "index_k"), 1)
    specs = []
    for kind, itemsize, d, ragged, in_place in (
        ("*bf16", 2, 128, False, False), ("*bf16", 2, 128, False, True), ("*bf16", 2, 64, True, False),
        ("*fp32", 4, 96, False, True),
    ):  # fmt: skip
        pointers = dict.fromkeys(("key_ptr", "value_ptr", "out_key_ptr", "out_value_ptr"), kind) | {"index_ptr": "*i64"}
        constexprs = ones | {"RAGGED": ragged, "IN_PLACE": in_place, **_blocks(d, itemsize, in_place)}
        if ragged:
            pointers["offsets_ptr"] = "*i64"
        else:
            constexprs["offsets_ptr"] = None
        specs.append(CompileSpec(compact_kv_kernel, sizes | pointers, constexprs, num_warps=4, num_stages=1))
    return specs
