"""The most similar destination of every source token, without the source x destination matrix.

With cos(i, j) = <x_i, x_j> / (|x_i| |x_j|) the op returns, for every source token i and over the destination tokens j,

    similarity[i] = max_j cos(i, j)        position[i] = the lowest j that reaches it

The positive factor 1 / |x_i| cannot change which j is best, so it is applied once, to the maximum. Norms are summed
from the same tiles the dot products read: no normalised copy, no gathered copy and no matrix is ever stored.
"""

import torch
import torch.nn.functional as F

from keeprate_kernels.runtime import HAS_TRITON, INTERPRETED, CompileSpec, tl, triton, use_triton

WHOLE = 1 << 18  # similarities up to which the reference holds the matrix; beyond, torch.max takes longer than the dots
CHUNK = 1 << 19  # similarities the reference holds at once otherwise: 2 MiB, which stays in a core's cache
GROUP = 64  # destinations whose maximum is taken before their position: amax is vectorised, max with indices is not
TINY = 1e-12  # least norm, as torch.nn.functional.normalize has it: a zero vector is similar to nothing

if HAS_TRITON:

    @triton.jit
    def bipartite_match_kernel(
        x_ptr, source_ptr, target_ptr, valid_ptr, best_ptr, position_ptr,
        s, t, c, x_b, x_n, x_c, source_b, target_b, valid_b, TINY: tl.constexpr,
        HAS_VALID: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """This program computes the best destination of BLOCK_S source tokens of one sample.

        x [b, n, c]; source [b, s] and target [b, t] int64 positions; valid [b, n] bytes; best [b, s] fp32 and position
        [b, s] int64, both contiguous. A batch stride of 0 shares source or target between samples.
        """
        row = tl.program_id(1).to(tl.int64)
        at = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        channel = tl.arange(0, BLOCK_C)
        source = tl.load(source_ptr + row * source_b + at, mask=at < s, other=0)
        source_row = x_ptr + row * x_b + source * x_n
        best = tl.full([BLOCK_S], float("-inf"), tl.float32)
        position = tl.zeros([BLOCK_S], tl.int32)
        source_square = tl.zeros([BLOCK_S], tl.float32)
        for start in range(0, t, BLOCK_T):
            column = start + tl.arange(0, BLOCK_T)
            usable = column < t
            target = tl.load(target_ptr + row * target_b + column, mask=usable, other=0)
            target_row = x_ptr + row * x_b + target * x_n
            if HAS_VALID:
                usable = usable & (tl.load(valid_ptr + row * valid_b + target, mask=usable, other=0) != 0)
            dots = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
            source_square = tl.zeros([BLOCK_S], tl.float32)
            target_square = tl.zeros([BLOCK_T], tl.float32)
            for first in range(0, c, BLOCK_C):
                inside = first + channel < c
                offset = (first + channel) * x_c
                a = tl.load(source_row[:, None] + offset[None, :], mask=(at < s)[:, None] & inside[None, :], other=0.0)
                d = tl.load(target_row[:, None] + offset[None, :], mask=usable[:, None] & inside[None, :], other=0.0)
                if UPCAST:
                    a, d = a.to(tl.float32), d.to(tl.float32)
                source_square += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
                target_square += tl.sum(d.to(tl.float32) * d.to(tl.float32), 1)
                dots = tl.dot(a, tl.trans(d), dots, input_precision="ieee")
            cosine = dots / tl.maximum(tl.sqrt(target_square), TINY)[None, :]
            cosine = tl.where(usable[None, :], cosine, float("-inf"))
            highest, where = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
            better = highest > best  # strictly: an equal one further on loses
            best = tl.where(better, highest, best)
            position = tl.where(better, start + where, position)
        best /= tl.maximum(tl.sqrt(source_square), TINY)
        if HAS_VALID:
            there = tl.load(valid_ptr + row * valid_b + source, mask=at < s, other=0) != 0
            best = tl.where(there, best, float("-inf"))
            position = tl.where(there, position, 0)
        tl.store(best_ptr + row * s + at, best, mask=at < s)
        tl.store(position_ptr + row * s + at, position.to(tl.int64), mask=at < s)


def _blocks(b: int, s: int, c: int, itemsize: int) -> dict[str, int]:
    """Tile sizes: source blocks as large as leaves a program for every multiprocessor, channels in one piece if few."""
    block_s = next((size for size in (64, 32) if b * -(-s // size) >= 128), 16)
    block_c = max(16, min(1 << (c - 1).bit_length(), 128 // itemsize))
    return {"BLOCK_S": block_s, "BLOCK_T": 64, "BLOCK_C": block_c}


def _launch(
    metric: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launcher; arguments as `bipartite_match`, index lists [b or 1, s]."""
    (b, _, c), s, t = metric.shape, source.shape[1], destination.shape[1]
    best = torch.empty(b, s, device=metric.device, dtype=torch.float32)
    position = torch.empty(b, s, device=metric.device, dtype=torch.int64)
    if metric.dtype == torch.float64:
        metric = metric.float()
    flags = None if valid is None else valid.to(torch.uint8).contiguous()
    blocks = _blocks(b, s, c, metric.element_size())
    bipartite_match_kernel[(triton.cdiv(s, blocks["BLOCK_S"]), b)](
        metric, source, destination, flags, best, position,
        s, t, c, *metric.stride(),
        *(0 if len(index) == 1 else index.stride(0) for index in (source, destination)),
        0 if valid is None else flags.stride(0), TINY,
        HAS_VALID=valid is not None, UPCAST=INTERPRETED, **blocks, num_warps=4, num_stages=3,
    )  # fmt: skip
    return best, position


def _pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [b, n, c] at positions index [b or 1, m] -> [b, m, c]."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def bipartite_match_reference(
    metric: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: a block of source tokens at a time against all destinations. Arguments as `bipartite_match`."""
    source, destination = _check(metric, source, destination, valid)
    unit = F.normalize(metric.float(), dim=-1, eps=TINY)
    a, d = _pick(unit, source), _pick(unit, destination)
    (b, s, _), t = a.shape, d.shape[1]
    hidden = None if valid is None else ~_pick(valid[..., None], destination).transpose(1, 2)  # b 1 t
    if b * s * t <= WHOLE:
        cosine = a @ d.mT
        best, position = (cosine if hidden is None else cosine.masked_fill_(hidden, float("-inf"))).max(-1)
    else:
        wide = -(-t // GROUP) * GROUP
        d = F.pad(d, (0, 0, 0, wide - t)).mT
        best, position = a.new_empty(b, s), source.new_empty(b, s)
        step = min(s, max(16, CHUNK // (b * wide)))
        buffer = a.new_empty(b * step * wide)
        for start in range(0, s, step):
            rows = slice(start, min(start + step, s))
            r = rows.stop - start
            cosine = torch.bmm(a[:, rows], d, out=buffer[: b * r * wide].view(b, r, wide))
            cosine[..., t:] = float("-inf")
            if hidden is not None:
                cosine[..., :t].masked_fill_(hidden, float("-inf"))
            groups = cosine.view(b * r, wide // GROUP, GROUP)
            highest, group = groups.amax(-1).max(-1)
            inside = groups[torch.arange(b * r, device=a.device), group].argmax(-1)
            best[:, rows], position[:, rows] = highest.view(b, r), (group * GROUP + inside).view(b, r)
    if valid is None:
        return best, position
    gone = ~_pick(valid[..., None], source).squeeze(-1)
    return best.masked_fill_(gone, float("-inf")), position.masked_fill_(gone, 0)


def _check(
    metric: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The index lists as contiguous [b or 1, m]; ValueError if a shape does not fit."""
    if metric.dim() != 3 or 0 in metric.shape or not metric.is_floating_point():
        raise ValueError(f"metric must be floating, [batch, tokens, channels], and not empty; got {metric.dtype} "
                         f"{tuple(metric.shape)}")  # fmt: skip
    lists = []
    for name, index in (("source", source), ("destination", destination)):
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must hold int32 or int64 positions; got {index.dtype}")
        given = tuple(index.shape)
        if index.dim() == 1:
            index = index[None]
        if index.dim() != 2 or len(index) not in (1, len(metric)) or index.shape[1] == 0:
            raise ValueError(f"{name} must be [m] or [{len(metric)}, m] positions, m >= 1; got {given}")
        lists.append(index.to(torch.int64).contiguous())
    if valid is not None and (valid.dtype != torch.bool or valid.shape != metric.shape[:2]):
        raise ValueError(f"valid must be boolean {tuple(metric.shape[:2])}; got {valid.dtype} {tuple(valid.shape)}")
    return lists[0], lists[1]


def bipartite_match(
    metric: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best destination of every source token by cosine, in O(s + t) memory beside the inputs.

    Args:
        metric: [b, n, c] features to compare; no gradient passes through them.
        source: [s] or [b, s] positions that look for a partner.
        destination: [t] or [b, t] positions to choose from, disjoint from the sources (a token resembles itself most).
        valid: [b, n] boolean, False = padding: never chosen, and as a source without a partner.

    Returns:
        (similarity [b, s] in fp32, position [b, s] in 0..t-1 within the destination list). Ties go to the lower
        position. A source that is padding, or has no valid destination, gets (-inf, 0).

    Raises:
        ValueError: If a shape or dtype does not fit.

    Source: ToMe (2210.09461), bipartite soft matching; the fused search is ours.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]]])
        >>> bipartite_match(x, torch.tensor([0]), torch.tensor([1, 2]))[1]
        tensor([[1]])
    """
    if not use_triton(metric, source, destination, valid):
        return bipartite_match_reference(metric, source, destination, valid)
    return _launch(metric, *_check(metric, source, destination, valid), valid)


def compile_specs() -> list[CompileSpec]:
    """Many small images (ToMe on a ViT), one long video, and fp32 with padding."""
    signature = dict.fromkeys(("source_ptr", "target_ptr", "position_ptr"), "*i64")
    signature |= {"best_ptr": "*fp32", **dict.fromkeys(("s", "t", "c", "x_b", "x_n"), "i32")}
    signature |= dict.fromkeys(("source_b", "target_b", "valid_b"), "i32")
    specs = []
    for kind, itemsize, b, s, c, has_valid in (
        ("*bf16", 2, 128, 98, 64, False), ("*bf16", 2, 1, 16384, 4096, True), ("*fp32", 4, 16, 288, 1024, True),
    ):  # fmt: skip
        constexprs = {"x_c": 1, "TINY": TINY, "HAS_VALID": has_valid, "UPCAST": False, **_blocks(b, s, c, itemsize)}
        pointers = {"x_ptr": kind} | ({"valid_ptr": "*u8"} if has_valid else {})
        constexprs |= {} if has_valid else {"valid_ptr": None}
        specs.append(CompileSpec(bipartite_match_kernel, signature | pointers, constexprs, num_warps=4, num_stages=3))
    return specs
