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

Source: ZipCache (arXiv 2405.14256, section 4.1, channel-separable token-wise quantisation); KIVI (arXiv 2402.02750,
keys per channel in groups of tokens, values per token).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

BITS = (2, 4, 8)
SCHEMES = ("channel", "token", "separable")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 16  # elements the reference works on at once: they stay in the second-level cache


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
        code = t.to(torch.uint8)
        if bits < 8:
            code = F.pad(code, (0, width * 8 // bits - d)).unflatten(3, (8 // bits, width))
            shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)[:, None]
            code = (code << shift).sum(3, dtype=torch.uint8)
        data[:, :, rows] = code
    return Packed(data, low, step, scale, bits, d, x.dtype, scheme, group_size)


def dequantise_reference(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """`dequantise` in plain torch, some thousand tokens at a time."""
    b, g, n, d = packed.shape
    bits = packed.bits
    out = torch.empty(b, g, n, d, dtype=dtype, device=packed.data.device)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=out.device)[:, None]
    for rows in _chunks(b, g, n, d):
        code = packed.data[:, :, rows]
        if bits < 8:
            code = ((code[..., None, :] >> shift) & (2**bits - 1)).flatten(3)[..., :d]
        t = code * _rows(packed.step, rows, packed.group_size)  # fp32
        t += _rows(packed.low, rows, packed.group_size)
        if packed.scale is not None:
            t *= packed.scale.float()
        out[:, :, rows] = t
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
    packed = quantise_reference(x, bits, scheme, valid, group_size)
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
    return dequantise_reference(packed, packed.dtype if dtype is None else dtype)


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

    Source: ZipCache (arXiv 2405.14256, section 4.1).
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

    Source: ZipCache (arXiv 2405.14256, section 4.3).
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
