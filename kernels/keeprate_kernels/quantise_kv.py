"""Keys and values in 2, 4 or 8 bits, packed into bytes: storage that really is small.

With L = 2^bits - 1 and the minimum m and maximum M of whatever shares one pair (low, step),

    low = m,   step = (M - m) / L,   code = floor((x - low) / step + 1/2),   x' = low + step code,

so |x - x'| <= step / 2. The schemes differ in what shares a pair:

    "channel"    all tokens of a channel, or `group_size` tokens of it       low, step [b, g, 1 or groups, d]
    "token"      all channels of a token                                     low, step [b, g, n, 1]
    "separable"  all channels of a token, after every channel j is divided by c_j = sqrt(max_n |x[n, j]|);
                 x' is multiplied by c_j again, so |x - x'| <= c_j step / 2

low, step and c are stored in the dtype of x. low is rounded down and step up: every x lies within [low, low + L step]
and the bounds hold for the stored numbers. Ties round up (floor of t + 1/2), here and in the kernels.

A byte holds 8 / bits codes of one token: with w = ceil(d bits / 8), byte j holds channel j in its lowest bits, then
channels j + w, j + 2 w ...; channels beyond d are 0. Neighbouring bytes so come from neighbouring channels, and both
packing and unpacking are whole-row operations.

Source: ZipCache (arXiv 2405.14256, channel-separable token-wise quantisation); KIVI (arXiv 2402.02750,
keys per channel in groups of tokens, values per token).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from keeprate_kernels.runtime import HAS_TRITON, CompileSpec, tl, triton, use_triton

BITS = (2, 4, 8)
SCHEMES = ("channel", "token", "separable")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 19  # elements the reference works on at once: fastest of 2^14 to 2^20 on a CPU core
TILE = 4096  # elements a program holds at once: 32 a thread of four warps

if HAS_TRITON:

    @triton.jit
    def _round_up(x, kind: tl.constexpr):
        """fp32 rounded towards +inf, as `_up` does."""
        near = x.to(kind)
        if kind == tl.float32:
            return near
        away = tl.where(x > 0, 1, -1)
        off = tl.where(near.to(tl.float32) < x, away, 0)
        return (near.to(tl.int16, bitcast=True).to(tl.int32) + off).to(tl.int16).to(kind, bitcast=True)

    @triton.jit
    def _tile(first, n, groups, group_size, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
        """Head and group of this program, and TILE tokens of its block from the `first` on, and which of them exist.

        Blocks do not cross groups, so that a program reads one row of statistics.
        """
        pid = tl.program_id(0)
        block, rest = pid % blocks, pid // blocks
        group, head = rest % groups, rest // groups
        inside = block * BLOCK + first + tl.arange(0, TILE)
        tokens = group * group_size + inside
        return head.to(tl.int64), group, tokens, (inside < group_size) & (tokens < n)

    @triton.jit
    def _valid(valid_ptr, valid_b, valid_g, valid_n, head, heads, tokens, there):
        at = valid_ptr + head // heads * valid_b + head % heads * valid_g + tokens.to(tl.int64) * valid_n
        return tl.load(at, mask=there, other=0) != 0

    @triton.jit
    def _extremes_kernel(
        x_ptr,  # [b, g, n, d], strides given
        valid_ptr,  # [b, g, n] uint8, strides given
        lo_ptr,  # [b g, groups, blocks, d] fp32
        hi_ptr,  # the same
        x_b, x_g, x_n, x_d, valid_b, valid_g, valid_n, heads, n, d, groups, group_size, blocks,
        HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """This program computes the smallest and the largest number of every channel over one block of tokens."""
        cols = tl.arange(0, D)
        lo = tl.full((TILE, D), float("inf"), tl.float32)
        hi = tl.full((TILE, D), float("-inf"), tl.float32)
        for first in range(0, BLOCK, TILE):
            head, _, tokens, held = _tile(first, n, groups, group_size, blocks, BLOCK, TILE)
            if HAS_VALID:
                held = held & _valid(valid_ptr, valid_b, valid_g, valid_n, head, heads, tokens, held)
            held = held[:, None] & (cols < d)[None, :]
            at = x_ptr + head // heads * x_b + head % heads * x_g
            at += tokens[:, None].to(tl.int64) * x_n + cols[None, :].to(tl.int64) * x_d
            x = tl.load(at, mask=held, other=0).to(tl.float32)  # tokens channels
            lo = tl.minimum(lo, tl.where(held, x, float("inf")))
            # min and max may pass over NaN: as infinity it reaches the step, which `quantise` looks at
            hi = tl.maximum(hi, tl.where(held, tl.where(tl.abs(x) < float("inf"), x, float("inf")), float("-inf")))
        out = tl.program_id(0).to(tl.int64) * d + cols
        tl.store(lo_ptr + out, tl.min(lo, 0), mask=cols < d)
        tl.store(hi_ptr + out, tl.max(hi, 0), mask=cols < d)

    @triton.jit
    def _pack_kernel(
        x_ptr,  # [b, g, n, d], strides given
        valid_ptr,  # [b, g, n] uint8, strides given
        scale_ptr,  # [b g, d]
        low_ptr,  # [b g, groups, d], or [b g, n] and written with TOKENWISE
        step_ptr,  # the same
        data_ptr,  # [b g, n, width] uint8, written
        x_b, x_g, x_n, x_d, valid_b, valid_g, valid_n, heads, n, d, groups, group_size, blocks, width,
        TOKENWISE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_VALID: tl.constexpr,
        BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """This program computes the bytes, and with TOKENWISE low and step, of one block of tokens."""
        PLANES: tl.constexpr = 8 // BITS
        TOP: tl.constexpr = 2**BITS - 1
        head, group, tokens, there = _tile(0, n, groups, group_size, blocks, BLOCK, BLOCK)
        real = there
        if HAS_VALID:
            real = there & _valid(valid_ptr, valid_b, valid_g, valid_n, head, heads, tokens, there)
        plane, byte = tl.arange(0, PLANES), tl.arange(0, WIDTH)
        cols = plane[:, None] * width + byte[None, :]  # planes bytes
        inside = (byte[None, :] < width) & (cols < d)
        held = real[:, None, None] & inside[None]
        at = x_ptr + head // heads * x_b + head % heads * x_g
        at += tokens[:, None, None].to(tl.int64) * x_n + cols[None].to(tl.int64) * x_d
        x = tl.load(at, mask=held, other=0).to(tl.float32)  # tokens planes bytes
        if HAS_SCALE:
            scale = tl.load(scale_ptr + head * d + cols, mask=inside, other=1).to(tl.float32)
            x = tl.div_rn(x, tl.broadcast_to(scale[None], (BLOCK, PLANES, WIDTH)))
        if TOKENWISE:
            kind: tl.constexpr = low_ptr.dtype.element_ty
            hi = tl.where(held, tl.where(tl.abs(x) < float("inf"), x, float("inf")), float("-inf"))
            hi = tl.max(tl.max(hi, 2), 1)
            lo = tl.min(tl.min(tl.where(held, x, float("inf")), 2), 1)
            lo, hi = tl.where(real, lo, 0.0), tl.where(real, hi, 0.0)
            low_out = -_round_up(-lo, kind)
            low = low_out.to(tl.float32)
            step_out = _round_up(tl.div_rn(hi - low, tl.full((BLOCK,), TOP, tl.float32)), kind)
            step = step_out.to(tl.float32)
            tl.store(low_ptr + head * n + tokens, low_out, mask=there)
            tl.store(step_ptr + head * n + tokens, step_out, mask=there)
            low, step = low[:, None, None], step[:, None, None]
        else:
            row = (head * groups + group) * d + cols
            low = tl.load(low_ptr + row, mask=inside, other=0).to(tl.float32)[None]
            step = tl.load(step_ptr + row, mask=inside, other=0).to(tl.float32)[None]
        unit = tl.broadcast_to(tl.where(step > 0, step, 1.0), (BLOCK, PLANES, WIDTH))
        t = tl.where(held, tl.div_rn(x - low, unit), 0.0)
        code = tl.minimum(t + 0.5, TOP).to(tl.int32)
        packed = tl.sum(code << (plane * BITS)[None, :, None], 1)  # tokens bytes
        out = (head * n + tokens[:, None]) * width + byte[None, :]
        tl.store(data_ptr + out, packed.to(tl.uint8), mask=there[:, None] & (byte < width)[None, :])

    @triton.jit
    def _unpack_kernel(
        data_ptr,  # [b g, n, width] uint8
        low_ptr,  # [b g, groups, d], or [b g, n] with TOKENWISE
        step_ptr,  # the same
        scale_ptr,  # [b g, d]
        out_ptr,  # [b g, n, d], written
        n, d, groups, group_size, blocks, width,
        TOKENWISE: tl.constexpr, HAS_SCALE: tl.constexpr,
        BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """This program computes the numbers of one block of tokens."""
        PLANES: tl.constexpr = 8 // BITS
        head, group, tokens, there = _tile(0, n, groups, group_size, blocks, BLOCK, BLOCK)
        plane, byte = tl.arange(0, PLANES), tl.arange(0, WIDTH)
        cols = plane[:, None] * width + byte[None, :]
        inside = (byte[None, :] < width) & (cols < d)
        at = (head * n + tokens[:, None]) * width + byte[None, :]
        packed = tl.load(data_ptr + at, mask=there[:, None] & (byte < width)[None, :], other=0).to(tl.int32)
        code = (packed[:, None, :] >> (plane * BITS)[None, :, None]) & (2**BITS - 1)  # tokens planes bytes
        if TOKENWISE:
            low = tl.load(low_ptr + head * n + tokens, mask=there, other=0).to(tl.float32)[:, None, None]
            step = tl.load(step_ptr + head * n + tokens, mask=there, other=0).to(tl.float32)[:, None, None]
        else:
            row = (head * groups + group) * d + cols
            low = tl.load(low_ptr + row, mask=inside, other=0).to(tl.float32)[None]
            step = tl.load(step_ptr + row, mask=inside, other=0).to(tl.float32)[None]
        x = code.to(tl.float32) * step + low
        if HAS_SCALE:
            x *= tl.load(scale_ptr + head * d + cols, mask=inside, other=0).to(tl.float32)[None]
        out = (head * n + tokens[:, None, None]) * d + cols[None]
        tl.store(out_ptr + out, x.to(out_ptr.dtype.element_ty), mask=there[:, None, None] & inside[None])


def _power(x: int) -> int:
    """The smallest power of two that is not below x."""
    return 1 << (x - 1).bit_length()


def _grid(heads: int, n: int, group_size: int | None, block: int) -> tuple[tuple[int], tuple[int, int, int], int]:
    """Grid of programs; groups, group size and blocks of a group; tokens of a block, within its group."""
    size = min(group_size or n, n)
    block = min(max(1, block), _power(size))
    groups, blocks = -(-n // size), -(-size // block)
    return (heads * groups * blocks,), (groups, size, blocks), block


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantised tensor [b, g, n, d].

    Attributes:
        data: [b, g, n, ceil(d * bits / 8)] uint8.
        low: Minimum: [b, g, 1, d] ([b, g, groups, d] with `group_size`) per channel, [b, g, n, 1] per token.
        step: Distance between neighbouring levels, shaped like `low`; 0 where everything equals `low`.
        scale: [b, g, 1, d] what channels were divided by (scheme "separable"), else None.
        bits: Bits of a code.
        dim: d.
        dtype: What was quantised, and what `dequantise` returns unless told otherwise.
        scheme: "channel", "token" or "separable".
        group_size: Tokens that share a channel's (low, step); None = all.
    """

    data: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor | None
    bits: int
    dim: int
    dtype: torch.dtype
    scheme: str
    group_size: int | None = None

    @property
    def n(self) -> int:
        """Tokens of a head."""
        return self.data.shape[2]

    @property
    def shape(self) -> torch.Size:
        """(b, g, n, d) of what was quantised."""
        return torch.Size((*self.data.shape[:3], self.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of all storages held."""
        held = [t.untyped_storage() for t in (self.data, self.low, self.step, self.scale) if t is not None]
        return sum({s.data_ptr(): s.nbytes() for s in held}.values())

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[b, g, n, d] in `dtype`, by default that of what was quantised."""
        return dequantise(self, dtype)

    def take(self, index: torch.Tensor) -> "Packed":
        """Some tokens of every head, unchanged to the bit.

        Args:
            index: [b, g, m] tokens.

        Raises:
            ValueError: If the shape does not fit, or tokens share statistics in groups, which taking would tear apart.
        """
        if index.dim() != 3 or index.shape[:2] != self.data.shape[:2]:
            raise ValueError(f"index must be [{self.data.shape[0]}, {self.data.shape[1]}, m]; got {tuple(index.shape)}")
        if self.group_size is not None:
            raise ValueError(f"tokens can be taken where group_size is None; got group_size {self.group_size}")
        parts = {"data": _gather(self.data, index)}
        if self.scheme != "channel":
            parts |= {"low": _gather(self.low, index), "step": _gather(self.step, index)}
        return replace(self, **parts)


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens index [b, g, m] of x [b, g, n, d]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))


def _up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 rounded towards +inf, to the next number of a 16-bit dtype (fp32 stays)."""
    if dtype == torch.float32:
        return x
    near = x.to(dtype)
    # neighbouring floats of one sign have neighbouring bit patterns
    off = (near.float() < x).to(torch.int16) * x.sign().to(torch.int16)
    return (near.view(torch.int16) + off).view(dtype)


def _affine(lo: torch.Tensor, hi: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, step) in `dtype` from fp32 extremes; nothing (lo > hi) gives (0, 0)."""
    nothing = lo > hi
    lo, hi = lo.masked_fill(nothing, 0.0), hi.masked_fill(nothing, 0.0)
    low = -_up(-lo, dtype)
    return low, _up((hi - low.float()) / (2**bits - 1), dtype)


def _extremes(x: torch.Tensor, valid: torch.Tensor | None, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest valid number of a channel, [b, g, groups, d] in fp32; (inf, -inf) where there is none."""
    lo = hi = x
    if valid is not None:
        lo, hi = (x.masked_fill(~valid[..., None], fill) for fill in (torch.inf, -torch.inf))
    n = x.shape[2]
    if n == 0 or n % group:  # to whole groups
        rest = (0, 0, 0, group - n % group)
        lo, hi = F.pad(lo, rest, value=torch.inf), F.pad(hi, rest, value=-torch.inf)
    lo, hi = (t.unflatten(2, (-1, group)) for t in (lo, hi))  # b g groups tokens d
    return lo.amin(3).float(), hi.amax(3).float()


def _scale(lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """c = sqrt(max |x|) of every channel [b, g, 1, d]; 1 where the channel is empty or zero."""
    top = torch.maximum(hi, -lo)
    return top.masked_fill(top <= 0, 1.0).sqrt().to(dtype)


def _rows(part: torch.Tensor, rows: slice, group: int | None) -> torch.Tensor:
    """low, step or scale of some tokens, in fp32, broadcastable over them."""
    if group is not None:
        part = part[:, :, torch.arange(rows.start, rows.stop, device=part.device) // group]
    elif part.shape[2] > 1:
        part = part[:, :, rows]
    return part.float()


def _pack(code: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Codes [..., d] to bytes [..., width]."""
    last = 8 // bits - 1
    planes = F.pad(code, (0, width * (last + 1) - code.shape[-1])).split(width, -1)
    byte = planes[last]
    for plane in planes[last - 1 :: -1]:
        byte = (byte << bits).bitwise_or_(plane)
    return byte


def _unpack(byte: torch.Tensor, bits: int, d: int) -> torch.Tensor:
    """Bytes [..., width] to codes [..., d]."""
    planes = [(byte >> shift).bitwise_and_(2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, -1)[..., :d]


def _chunks(b: int, g: int, n: int, d: int) -> list[slice]:
    size = max(1, CHUNK // max(1, b * g * d))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def quantise_reference(
    x: torch.Tensor, bits: int, scheme: str, valid: torch.Tensor | None = None, group_size: int | None = None
) -> Packed:
    """`quantise` in plain torch, some thousand tokens at a time; arguments are taken as checked."""
    b, g, n, d = x.shape
    top, width = 2**bits - 1, -(-d * bits // 8)
    scale = None
    if scheme == "channel":
        low, step = _affine(*_extremes(x, valid, group_size or max(n, 1)), bits, x.dtype)
    else:
        low, step = x.new_empty(b, g, n, 1), x.new_empty(b, g, n, 1)
        if scheme == "separable":
            scale = _scale(*_extremes(x, valid, max(n, 1)), x.dtype)
    data = torch.empty(b, g, n, width, dtype=torch.uint8, device=x.device)
    for rows in _chunks(b, g, n, d):
        part = x[:, :, rows]
        if scheme == "channel":
            t = part - _rows(low, rows, group_size)  # fp32
            unit = _rows(step, rows, group_size)
        else:
            part = part.float() if scale is None else part / scale.float()
            lo, hi = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
            if valid is not None:
                lo, hi = (e.masked_fill(~valid[:, :, rows, None], 0.0) for e in (lo, hi))
            low[:, :, rows], step[:, :, rows] = _affine(lo, hi, bits, x.dtype)
            t = part - low[:, :, rows].float()
            unit = step[:, :, rows].float()
        t.div_(unit.masked_fill(unit == 0, 1.0)).add_(0.5).clamp_(max=top)
        if valid is not None:  # whatever lies there, NaN included, leaves no trace
            t.masked_fill_(~valid[:, :, rows, None], 0.0)
        code = t.to(torch.int16).to(torch.uint8)  # straight to uint8 is three times slower in torch 2.13
        data[:, :, rows] = code if bits == 8 else _pack(code, bits, width)
    return Packed(data, low, step, scale, bits, d, x.dtype, scheme, group_size)


def dequantise_reference(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """`dequantise` in plain torch, some thousand tokens at a time."""
    b, g, n, d = packed.shape
    bits = packed.bits
    out = torch.empty(b, g, n, d, dtype=dtype, device=packed.data.device)
    for rows in _chunks(b, g, n, d):
        code = packed.data[:, :, rows]
        t = (code if bits == 8 else _unpack(code, bits, d)) * _rows(packed.step, rows, packed.group_size)  # fp32
        t += _rows(packed.low, rows, packed.group_size)
        if packed.scale is not None:
            t *= packed.scale.float()
        out[:, :, rows] = t
    return out


def _extremes_triton(
    x: torch.Tensor, valid: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_extremes` in one launch; torch joins the blocks."""
    b, g, n, d = x.shape
    # 256 tokens a program: what they write is 1/64 of the bf16 they read
    grid, (groups, size, blocks), block = _grid(b * g, n, group_size, 256)
    lo, hi = x.new_empty(2, b, g, groups, blocks, d, dtype=torch.float32)
    _extremes_kernel[grid](
        x, x if valid is None else valid, lo, hi, *x.stride(), *((0, 0, 0) if valid is None else valid.stride()),
        g, n, d, groups, size, blocks,
        HAS_VALID=valid is not None, BLOCK=block, TILE=min(block, max(1, TILE // _power(d))), D=_power(d), num_warps=4,
    )  # fmt: skip
    return lo.amin(3), hi.amax(3)


def _quantise_triton(
    x: torch.Tensor, bits: int, scheme: str, valid: torch.Tensor | None = None, group_size: int | None = None
) -> Packed:
    b, g, n, d = x.shape
    width = -(-d * bits // 8)
    if valid is not None:
        valid = valid.view(torch.uint8)
    scale = None
    if scheme == "channel":
        low, step = _affine(*_extremes_triton(x, valid, group_size), bits, x.dtype)
    else:
        low, step = x.new_empty(b, g, n, 1), x.new_empty(b, g, n, 1)
        if scheme == "separable":
            scale = _scale(*_extremes_triton(x, valid, None), x.dtype)
    data = torch.empty(b, g, n, width, dtype=torch.uint8, device=x.device)
    grid, (groups, size, blocks), block = _grid(b * g, n, group_size, TILE // (_power(width) * 8 // bits))
    _pack_kernel[grid](
        x, x if valid is None else valid, x if scale is None else scale, low, step, data,
        *x.stride(), *((0, 0, 0) if valid is None else valid.stride()),
        g, n, d, groups, size, blocks, width,
        TOKENWISE=scheme != "channel", HAS_SCALE=scale is not None, HAS_VALID=valid is not None,
        BITS=bits, BLOCK=block, WIDTH=_power(width), num_warps=4,
    )  # fmt: skip
    return Packed(data, low, step, scale, bits, d, x.dtype, scheme, group_size)


def _dequantise_triton(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    b, g, n, d = packed.shape
    width = packed.data.shape[3]
    data, low, step = packed.data.contiguous(), packed.low.contiguous(), packed.step.contiguous()
    scale = None if packed.scale is None else packed.scale.contiguous()
    out = torch.empty(b, g, n, d, dtype=dtype, device=data.device)
    block = TILE // (_power(width) * 8 // packed.bits)
    grid, (groups, size, blocks), block = _grid(b * g, n, packed.group_size, block)
    _unpack_kernel[grid](
        data, low, step, data if scale is None else scale, out,
        n, d, groups, size, blocks, width,
        TOKENWISE=packed.scheme != "channel", HAS_SCALE=scale is not None,
        BITS=packed.bits, BLOCK=block, WIDTH=_power(width), num_warps=4,
    )  # fmt: skip
    return out


def _check(x: torch.Tensor, bits: int, scheme: str, valid: torch.Tensor | None, group_size: int | None) -> None:
    if x.dim() != 4 or x.shape[3] == 0:
        raise ValueError(f"x must be [batch, heads, tokens, dim] with dim of at least 1; got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}; got {x.dtype}")
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {bits!r}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}; got {scheme!r}")
    if group_size is not None and scheme != "channel":
        raise ValueError(f"group_size goes with scheme 'channel'; got scheme {scheme!r}")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be None or an integer of at least 1; got {group_size!r}")
    if valid is not None:
        b, g, n = x.shape[:3]
        if valid.dtype != torch.bool or valid.shape not in ((b, g, n), (b, 1, n)):
            raise ValueError(f"valid must be boolean [{b}, {g}|1, {n}]; got {valid.dtype} {tuple(valid.shape)}")


@torch.no_grad()
def quantise(
    x: torch.Tensor,
    bits: int,
    scheme: str = "channel",
    valid: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
) -> Packed:
    """Quantise a tensor and pack it into bytes.

    Args:
        x: [b, g, n, d] in fp32, fp16 or bf16, of any strides.
        bits: 2, 4 or 8.
        scheme: "channel", "token" or "separable" (see the module).
        valid: [b, g|1, n] False = the token holds nothing: it influences no other, and comes back as the channel's low
            or as 0. None = all hold something.
        group_size: Tokens that share a channel's statistics (scheme "channel"); None = all.

    Returns:
        The packed tensor, d * bits / 8 bytes a token and what its statistics take.

    Raises:
        ValueError: If shapes or choices do not fit, or a valid token is NaN or infinite (or spans more than fp32 does).

    Example:
        >>> x = torch.randn(1, 2, 100, 64)
        >>> packed = quantise(x, 4, "token")
        >>> packed.data.shape, bool(((packed.dequantise() - x).abs() <= 0.501 * packed.step).all())
        (torch.Size([1, 2, 100, 32]), True)
    """
    _check(x, bits, scheme, valid, group_size)
    if valid is not None:
        valid = valid.expand(x.shape[:3])
    run = _quantise_triton if use_triton(x, valid) and x.numel() else quantise_reference
    packed = run(x, bits, scheme, valid, group_size)
    if not bool(packed.step.isfinite().all()):  # both extremes enter every step, so nothing slips through
        raise ValueError(
            f"x must be finite where valid, and span less than fp32 does; got NaN, infinity or more, {x.dtype}"
        )
    return packed


@torch.no_grad()
def dequantise(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Unpack and return to numbers.

    Args:
        packed: What `quantise` returned.
        dtype: Of the result; None = that of what was quantised.

    Returns:
        [b, g, n, d], contiguous; computed in fp32 and rounded once.
    """
    run = _dequantise_triton if use_triton(packed.data) and packed.data.numel() else dequantise_reference
    return run(packed, packed.dtype if dtype is None else dtype)


def quantise_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    bits: int = 4,
    valid: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
) -> tuple[Packed, Packed]:
    """Cached keys per channel, cached values per token with separated channels.

    Args:
        key: [b, g, n, d].
        value: [b, g, n, d_v].
        bits: 2, 4 or 8.
        valid: [b, g|1, n] False = padding, which influences nothing.
        group_size: Tokens that share a key channel's statistics; None = all.

    Returns:
        Packed keys (scheme "channel") and packed values (scheme "separable").

    Raises:
        ValueError: If shapes or choices do not fit, or a number is NaN or infinite.

    Source: ZipCache (arXiv 2405.14256).
    """
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must be [batch, heads, tokens, dim] and agree in the first three; "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    keys = quantise(key, bits, "channel", valid, group_size=group_size)
    return keys, quantise(value, bits, "separable", valid)


def quantise_mixed(
    key: torch.Tensor,
    value: torch.Tensor,
    salient: torch.Tensor,
    bits: tuple[int, int] = (4, 2),
    valid: torch.Tensor | None = None,
) -> tuple[tuple[Packed, Packed, torch.Tensor], tuple[Packed, Packed, torch.Tensor]]:
    """Two precisions by importance: salient tokens in more bits than the rest, each with statistics of its own.

    Args:
        key: [b, g, n, d].
        value: [b, g, n, d_v].
        salient: [b, g, n] boolean, equally many True in every head.
        bits: Of the salient tokens and of the rest.
        valid: [b, g|1, n] False = padding, which influences nothing.

    Returns:
        (keys, values, index [b, g, m]) of the salient tokens and of the rest; indices are sorted.

    Raises:
        ValueError: If shapes do not fit, or heads differ in the number of salient tokens.

    Source: ZipCache (arXiv 2405.14256).
    """
    if salient.dtype != torch.bool or salient.dim() != 3 or salient.shape != key.shape[:3]:
        raise ValueError(f"salient must be boolean {tuple(key.shape[:3])}; got {salient.dtype} {tuple(salient.shape)}")
    if len(bits) != 2:
        raise ValueError(f"bits must be two numbers, for the salient tokens and for the rest; got {bits!r}")
    counts = salient.sum(-1).unique().tolist()
    if len(counts) > 1:
        raise ValueError(f"salient must hold equally many tokens in every head; got from {counts[0]} to {counts[-1]}")
    order = (~salient).to(torch.uint8).argsort(dim=-1, stable=True)
    parts = []
    for index, width in zip(order.split([*counts, order.shape[-1] - sum(counts)], -1), bits, strict=True):
        real = None if valid is None else valid.expand(salient.shape).gather(2, index)
        parts.append((*quantise_kv(_gather(key, index), _gather(value, index), width, real), index.contiguous()))
    return tuple(parts)


def compile_specs() -> list[CompileSpec]:
    """Every kernel as a bf16 cache with heads of 128 launches it (of 256 where that has the largest tile)."""
    strides = dict.fromkeys(("x_b", "x_g", "x_n", "valid_b", "valid_g"), "i64")
    sizes = dict.fromkeys(("n", "d", "groups", "group_size", "blocks"), "i32")
    tokens = {"x_ptr": "*bf16", "valid_ptr": "*u8", "heads": "i32", **strides, **sizes}
    one = {"x_d": 1, "valid_n": 1, "HAS_VALID": True}
    parts = {"low_ptr": "*bf16", "step_ptr": "*bf16", "scale_ptr": "*bf16", "data_ptr": "*u8", "width": "i32"}
    extremes = {**tokens, "lo_ptr": "*fp32", "hi_ptr": "*fp32"}
    specs = [CompileSpec(_extremes_kernel, extremes, {**one, "BLOCK": 256, "TILE": TILE // 256, "D": 256})]
    for bits, scheme in [(4, "token"), *((bits, scheme) for bits in BITS for scheme in ("channel", "separable"))]:
        flags = {"TOKENWISE": scheme != "channel", "HAS_SCALE": scheme == "separable", "BITS": bits}
        flags |= {"BLOCK": TILE // 128, "WIDTH": 128 * bits // 8}
        specs.append(CompileSpec(_pack_kernel, {**tokens, **parts}, {**one, **flags}))
        specs.append(CompileSpec(_unpack_kernel, {**sizes, **parts, "out_ptr": "*bf16"}, flags))
    return specs
