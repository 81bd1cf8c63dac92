"""Gradients of an output head from the gradient of its logits, which are never in memory as a whole.

Statistics of a token that depend on its logits z through p = softmax(z) and log p have, with d = log p - mean and
mean = sum_v p[v] log p[v], a gradient of the form

    dz = p (push + d (linear + quadratic (d + 2))) - pull onehot(label)
    dhidden = dz weight,   dweight = dz^T hidden,   dbias = sum_tokens dz

with four numbers per token: nll has push = pull = g, log-sum-exp push = g, mean linear = g, and the variance of log p
quadratic = g and push = -g variance. `token_stats` and `kept_rows_ce` hand over only rows that some gradient reaches.

A tile of tokens x vocabulary entries exists at a time. In Triton one kernel recomputes its logits in registers and
fp32 and writes dz in the dtype of the inputs; the two products behind it are plain ones, which torch does best.
"""

import torch

from keeprate_kernels.runtime import HAS_TRITON, INTERPRETED, CompileSpec, tl, triton

# Tokens and vocabulary entries of a tile. On a CPU it should stay in the second-level cache (seen for the statistics of
# 2048 tokens with 256 channels and 32k entries on one core: 256 x 512 0.81 s, 64 x 4096 1.49 s, 512 x 32k 1.56 s, the
# product alone 0.85 s). On a GPU it only has to be large enough for a product; 2^25 entries are 64 MiB in bf16.
CPU_TILE = (256, 512)
GPU_TILE = (4096, 8192)

if HAS_TRITON:

    @triton.jit
    def logits_tile(
        h_ptr, w_ptr, bias_ptr, rows, cols, c, stride_ht, stride_hc, stride_wv, stride_wc, softcap,
        HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_C: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """Logits [BLOCK_T, BLOCK_V] in fp32; rows and cols are valid indices (the caller clamps them)."""
        offs = tl.arange(0, BLOCK_C)
        h = h_ptr + rows.to(tl.int64)[:, None] * stride_ht + offs[None, :] * stride_hc
        w = w_ptr + cols.to(tl.int64)[None, :] * stride_wv + offs[:, None] * stride_wc
        z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, c, BLOCK_C):
            if EVEN_C:
                x = tl.load(h)
                y = tl.load(w)
            else:
                x = tl.load(h, mask=(k + offs)[None, :] < c, other=0.0)
                y = tl.load(w, mask=(k + offs)[:, None] < c, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            z = tl.dot(x, y, z, input_precision="ieee")
            h += BLOCK_C * stride_hc
            w += BLOCK_C * stride_wc
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
        if HAS_CAP:
            u = tl.exp(-2.0 * tl.abs(z) / softcap)  # tanh, from what every version of triton has
            u = softcap * (1.0 - u) / (1.0 + u)
            z = tl.where(z < 0, -u, u)
        return z

    @triton.jit
    def _dlogits_kernel(
        h_ptr,  # [t, c]
        w_ptr,  # [v, c], the part of the vocabulary that begins at entry first
        bias_ptr,  # [v]
        label_ptr,  # [t] int64
        row_ptr,  # [7, t] fp32: largest logit, log-sum-exp above it, push, pull, mean, linear, quadratic
        out_ptr,  # [t, v] in the dtype of hidden
        t, v, c, first, stride_row, stride_ht, stride_hc, stride_wv, stride_wc, softcap,
        SPREAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_C: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """This program computes the gradient of BLOCK_T x BLOCK_V logits, which never leave its registers."""
        tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = tl.minimum(tokens, t - 1)
        z = logits_tile(
            h_ptr, w_ptr, bias_ptr, rows, tl.minimum(cols, v - 1), c, stride_ht, stride_hc, stride_wv, stride_wc,
            softcap, HAS_BIAS, HAS_CAP, EVEN_C, UPCAST, BLOCK_T, BLOCK_V, BLOCK_C,
        )  # fmt: skip
        label = tl.load(label_ptr + rows).to(tl.int32)
        row = row_ptr + rows
        push = tl.load(row + 2 * stride_row)
        pull = tl.load(row + 3 * stride_row)
        logp = z - tl.load(row)[:, None] - tl.load(row + stride_row)[:, None]
        p = tl.exp(logp)
        if SPREAD:
            d = logp - tl.load(row + 4 * stride_row)[:, None]
            linear = tl.load(row + 5 * stride_row)[:, None]
            quadratic = tl.load(row + 6 * stride_row)[:, None]
            dz = p * (push[:, None] + d * (linear + quadratic * (d + 2.0)))
        else:
            dz = p * push[:, None]
        dz -= tl.where((first + cols)[None, :] == label[:, None], pull[:, None], 0.0)
        if HAS_CAP:
            dz *= 1.0 - (z / softcap) * (z / softcap)
        out = out_ptr + tokens.to(tl.int64)[:, None] * v + cols[None, :]
        tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=(tokens < t)[:, None] & (cols < v)[None, :])


def config(dtype: torch.dtype, capability: int, wide: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and warps and stages. Reasoned from what ptxas reports, not measured: no GPU was at hand.

    Folding a tile into statistics (`wide`) lives on the product, and Hopper's wgmma is at its best with 256 columns; on
    an A100, or with a soft cap, those spill. `_dlogits_kernel` with 128 columns leaves registers for two programs a
    multiprocessor, so that one multiplies while the other one writes.
    """
    if INTERPRETED:
        return {"BLOCK_T": 32, "BLOCK_V": 64, "BLOCK_C": 32}, {}
    if dtype == torch.float32:  # "ieee" products use no tensor cores: registers are what is short
        return {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_C": 32}, {"num_warps": 4, "num_stages": 2}
    columns = 256 if wide and capability >= 90 else 128
    return {"BLOCK_T": 128, "BLOCK_V": columns, "BLOCK_C": 64}, {"num_warps": 8, "num_stages": 3}


def configure(hidden, bias, softcap, wide):
    """Block sizes; every constexpr but SPREAD; warps and stages."""
    major, minor = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    block, launch = config(hidden.dtype, 10 * major + minor, wide and softcap is None)
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": softcap is not None,
        "EVEN_C": hidden.shape[1] % block["BLOCK_C"] == 0,
        "UPCAST": INTERPRETED,  # the interpreter is right in fp32
    }
    return block, flags | block, launch


def tile_logits(tile: torch.Tensor, hidden, weight, bias, softcap) -> torch.Tensor:
    """Logits of some tokens and vocabulary entries, in the given memory."""
    z = torch.mm(hidden, weight.T, out=tile[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], -1))
    if bias is not None:
        z += bias
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def blocks(size: int, step: int):
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, summed in the wide dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # tensor cores, unrounded result
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _dlogits_triton(tile, hidden, weight, bias, labels, first, softcap, coefficients, spread):
    (t, c), v = hidden.shape, weight.shape[0]
    block, flags, launch = configure(hidden, bias, softcap, wide=False)
    out = tile[: t * v].view(t, v)
    _dlogits_kernel[triton.cdiv(t, block["BLOCK_T"]), triton.cdiv(v, block["BLOCK_V"])](
        hidden, weight, bias, labels, coefficients, out, t, v, c, first, coefficients.stride(0), *hidden.stride(),
        *weight.stride(), softcap or 1.0, SPREAD=spread, **flags, **launch,
    )  # fmt: skip
    return out


def _dlogits_torch(tile, hidden, weight, bias, labels, first, softcap, coefficients, spread):
    top, log_total, push, pull, mean, linear, quadratic = coefficients[..., None]
    z = tile_logits(tile, hidden, weight, bias, softcap)
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    z.sub_(top).sub_(log_total)
    if spread:
        d = z - mean
        z = z.exp_().mul_(d.add(2).mul_(quadratic).add_(linear).mul_(d).add_(push))
    else:
        z = z.exp_().mul_(push)
    index = labels[:, None] - first
    inside = (index >= 0) & (index < z.shape[1])
    index = index.clamp(0, z.shape[1] - 1)
    z.scatter_(1, index, z.gather(1, index) - torch.where(inside, pull, 0))
    return z if slope is None else z.mul_(slope)


def head_gradient(hidden, weight, bias, labels, softcap, coefficients, spread, needs, on_triton, chunk):
    """Gradients of hidden [t, c], weight [v, c] and bias [v], tile by tile; None where not needed.

    Vocabulary outside, tokens inside: a block of dweight is finished before the next begins, so nothing but [t, c] is
    held in a wider dtype. The logits tile is recomputed (in Triton inside the kernel that turns it into dlogits, in
    registers and fp32); the two products behind it are plain matrix products, which torch does best.
    """
    (t, c), v = hidden.shape, weight.shape[0]
    wide = widened(hidden.dtype)
    dlogits = _dlogits_triton if on_triton else _dlogits_torch
    if not on_triton:
        hidden = hidden.to(wide)
    dhidden = torch.zeros(t, c, dtype=wide, device=hidden.device) if needs[0] else None
    dweight = torch.zeros_like(weight) if needs[1] else None
    dbias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    tile = hidden.new_empty(min(t, chunk[0]) * min(v, chunk[1]))
    for cols in blocks(v if t else 0, chunk[1]):
        w = weight[cols].to(hidden.dtype)
        part = w.new_zeros(w.shape, dtype=wide) if needs[1] else None
        bias_sum = w.new_zeros(w.shape[0], dtype=wide) if dbias is not None else None
        for rows in blocks(t, chunk[0]):
            dz = dlogits(
                tile, hidden[rows], w, None if bias is None else bias[cols], labels[rows], cols.start, softcap,
                coefficients[:, rows], spread,
            )  # fmt: skip
            if needs[0]:
                _add_product(dhidden[rows], dz, w)
            if needs[1]:
                _add_product(part, dz.T, hidden[rows])
            if dbias is not None:
                bias_sum += dz.sum(0, dtype=wide)
        if needs[1]:
            dweight[cols] = part
        if dbias is not None:
            dbias[cols] = bias_sum
    return dhidden, dweight, dbias


def compile_specs() -> list[CompileSpec]:
    """The kernel as it is launched in bf16: plain; with spread, bias, soft cap and odd c; for one token."""
    ints = ("t", "v", "c", "first", "stride_row", "stride_ht", "stride_wv")
    signature = {"h_ptr": "*bf16", "w_ptr": "*bf16", "label_ptr": "*i64", "row_ptr": "*fp32", "out_ptr": "*bf16"}
    signature |= {"softcap": "fp32"} | dict.fromkeys(ints, "i32")
    block, launch = config(torch.bfloat16, 90, wide=False)
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "EVEN_C": True, "UPCAST": False, "bias_ptr": None}
    plain |= {"stride_hc": 1, "stride_wc": 1} | block
    full = {k: x for k, x in plain.items() if k != "bias_ptr"} | {"HAS_BIAS": True, "HAS_CAP": True, "EVEN_C": False}
    single = {k: x for k, x in signature.items() if k not in ("t", "stride_row")}
    return [
        CompileSpec(_dlogits_kernel, signature, plain | {"SPREAD": False}, **launch),
        CompileSpec(_dlogits_kernel, signature | {"bias_ptr": "*bf16"}, full | {"SPREAD": True}, **launch),
        CompileSpec(_dlogits_kernel, single, plain | {"SPREAD": False, "t": 1, "stride_row": 1}, **launch),
    ]
