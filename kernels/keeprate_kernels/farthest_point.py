"""Greedy selection of k tokens, one after the other: far from each other, covering the rest, or of large determinant.

With S the chosen set, d(n, i) a distance, s(n, i) a similarity and w a weight, each step adds argmax_n of

    max_min    w[n] min_{i in S} d(n, i)                                        run[n] <- min(run[n], d(n, new))
    max_sum    w[n] sum_{i in S} d(n, i)                                        run[n] <- run[n] + d(n, new)
    suppress   w[n] where max_{i in S} s(n, i) <= tau                           run[n] <- min(run[n], d(n, new))
    coverage   sum_m w[m] relu(s(m, n) - best[m]),  best[m] = max_{i in S} s(m, i), at least 0
    dpp        det L[S + n] / det L[S],  L = diag(w) s diag(w)                  run[n] <- run[n] - e[n]^2

so all keep one running number a token and touch one row of distances a step. Coverage subtracts what the rows that
`new` covers better have lost, clamp(s[m], old best, new best) - old best: a few rows, not the whole matrix. For dpp,
e[n] = (L[new, n] - <E[:, new], E[:, n]>) / sqrt(run[new]) is the next row of the Cholesky factor E [k, n].
Greedy choices do not depend on k: the first j of the order are the choice for j.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate_kernels.runtime import HAS_TRITON, CompileSpec, tl, triton, use_triton

OBJECTIVES = ("max_min", "max_sum", "suppress", "coverage", "dpp")
METRICS = ("cosine", "euclidean", "similarity", "distance")
MATRICES = METRICS[2:]  # those for which x is the matrix itself
STARTS = ("mean", "isolated", "weight")
HELD = 1 << 26  # cosines (256 MiB) up to which they are computed at once and held; beyond, a row at a time
FEW = 16  # on a CPU: the matrix of n rows takes no longer than this many times fewer rows, one at a time
CHUNK = 1 << 22  # similarities at once where the nearest neighbour of every token is sought
EXACT = "donot_use_mm_for_euclid_dist"  # the fast way subtracts squares and loses half of the digits
TINY = 1e-12  # least norm, as torch.nn.functional.normalize has it: a zero vector is similar to nothing
RESIDUAL = 1e-5  # share of L[n, n] below which a residual is fp32 rounding: the token depends on those chosen
# What a token is at a step; the highest there is wins, whatever its number.
TAKEN, PADDING, FILL, OPEN = range(4)

if HAS_TRITON:

    @triton.jit
    def farthest_point_kernel(
        x_ptr, scale_ptr, matrix_ptr, weight_ptr, tier_ptr, run_ptr, limit_ptr, factor_ptr, best_ptr, list_ptr, old_ptr,
        order_ptr, gain_ptr, n, m, c, k, x_b, x_n, x_c, matrix_b, matrix_m, tau,
        OBJECTIVE: tl.constexpr, STREAM: tl.constexpr, COSINE: tl.constexpr, DISTANCE: tl.constexpr,
        HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """This program computes the order of one sample, from its second token on, and the gains.

        x [b, n, c] (cosines: with scale [b, n] = 1 / norm) or matrix [b, m, n]; the rest contiguous: weight [b, n];
        tier [b, n] bytes; run [b, n], fp64 for coverage; limit [b, n]; factor [b, k, n]; best, old [b, m] and list
        [b, m] int32; order [b, k] int64 and gain [b, k], whose first column is given. run, tier, best are updated.
        """
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * x_b
        matrix_ptr += row * matrix_b
        new = tl.load(order_ptr + row * k).to(tl.int32)
        for step in range(1, k):
            pivot, live, changed, old_sum = 1.0, True, 0, tl.full([], 0.0, tl.float64)
            if OBJECTIVE == "dpp":
                pivot = tl.load(run_ptr + row * n + new)
                live = tl.load(gain_ptr + row * k + step - 1) > 0
                pivot = tl.sqrt(tl.where(live, pivot, 1.0))
            if OBJECTIVE == "coverage":  # list the rows that the new token covers better than any before
                for start in range(0, m, BLOCK_N):
                    at = start + tl.arange(0, BLOCK_N)
                    old = tl.load(best_ptr + row * m + at, mask=at < m, other=0.0)
                    value = tl.load(matrix_ptr + at.to(tl.int64) * matrix_m + new, mask=at < m, other=0.0)
                    more = (value > old) & (at < m)
                    slot = row * m + changed + tl.cumsum(more.to(tl.int32), 0) - 1
                    tl.store(list_ptr + slot, at, mask=more)
                    tl.store(old_ptr + slot, old, mask=more)
                    tl.store(best_ptr + row * m + at, value, mask=more)
                    changed += tl.sum(more.to(tl.int32), 0)
                    old_sum += tl.sum(tl.where(more, old, 0.0).to(tl.float64), 0)
            tl.debug_barrier()  # all threads have read (and listed) what others write or read from here on
            top, top_key, top_at = -1, float("-inf"), 0
            for start in range(0, n, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                inside = at < n
                run = tl.load(run_ptr + row * n + at, mask=inside, other=0.0)
                weight = tl.full([BLOCK_N], 1.0, tl.float32)
                if HAS_WEIGHT:
                    weight = tl.load(weight_ptr + row * n + at, mask=inside, other=0.0)
                tier = tl.load(tier_ptr + row * n + at, mask=inside, other=0).to(tl.int32)
                tier = tl.where(at == new, 0, tier)
                if OBJECTIVE == "coverage":
                    lost = tl.zeros([BLOCK_N], tl.float64)
                    for r in range(0, changed, BLOCK_R):
                        slot = r + tl.arange(0, BLOCK_R)
                        there = slot < changed
                        line = tl.load(list_ptr + row * m + slot, mask=there, other=0).to(tl.int64)
                        low = tl.load(old_ptr + row * m + slot, mask=there, other=0.0)
                        high = tl.load(best_ptr + row * m + line, mask=there, other=0.0)
                        both = there[:, None] & inside[None, :]
                        tile = tl.load(matrix_ptr + line[:, None] * matrix_m + at[None, :], mask=both, other=0.0)
                        tile = tl.minimum(tl.maximum(tile, low[:, None]), high[:, None])
                        lost += tl.sum(tl.where(there[:, None], tile, 0.0).to(tl.float64), 0)
                    run -= lost - old_sum
                    key = run.to(tl.float32)
                else:
                    value = tl.zeros([BLOCK_N], tl.float32)
                    if STREAM:
                        for first in range(0, c, BLOCK_C):
                            channel = first + tl.arange(0, BLOCK_C)
                            tile = tl.load(
                                x_ptr + at[:, None].to(tl.int64) * x_n + channel[None, :] * x_c,
                                mask=inside[:, None] & (channel < c)[None, :], other=0.0,
                            ).to(tl.float32)  # fmt: skip
                            centre = tl.load(
                                x_ptr + new.to(tl.int64) * x_n + channel * x_c, mask=channel < c, other=0.0
                            )
                            centre = centre.to(tl.float32)[None, :]
                            if COSINE:
                                value += tl.sum(tile * centre, 1)
                            else:
                                value += tl.sum((tile - centre) * (tile - centre), 1)
                        if COSINE:
                            value *= tl.load(scale_ptr + row * n + at, mask=inside, other=0.0)
                            value *= tl.load(scale_ptr + row * n + new)
                        else:
                            value = tl.sqrt(value)
                    else:
                        value = tl.load(matrix_ptr + new.to(tl.int64) * matrix_m + at, mask=inside, other=0.0)
                    gap = value
                    if not DISTANCE:
                        gap = tl.maximum(1.0 - value, 0.0)
                    if OBJECTIVE == "max_min":
                        run = tl.minimum(run, gap)
                        key = run * weight
                    elif OBJECTIVE == "max_sum":
                        run += gap
                        key = run * weight
                    elif OBJECTIVE == "suppress":
                        run = tl.minimum(run, gap)
                        tier = tl.where((tier == 3) & (run < 1.0 - tau), 2, tier)
                        key = weight
                    else:
                        if HAS_WEIGHT:
                            value *= weight * tl.load(weight_ptr + row * n + new)
                        for r in range(0, step - 1, BLOCK_R):
                            line = r + tl.arange(0, BLOCK_R)
                            factor = factor_ptr + (row * k + line) * n
                            tile = tl.load(
                                factor[:, None] + at[None, :],
                                mask=(line < step - 1)[:, None] & inside[None, :],
                                other=0.0,
                            )
                            value -= tl.sum(tile * tl.load(factor + new, mask=line < step - 1, other=0.0)[:, None], 0)
                        value = tl.where(live, value / pivot, 0.0)
                        tl.store(factor_ptr + (row * k + step - 1) * n + at, value, mask=inside)
                        run = tl.maximum(run - value * value, 0.0)
                        limit = tl.load(limit_ptr + row * n + at, mask=inside, other=0.0)
                        tier = tl.where((tier == 3) & (run <= limit), 2, tier)
                        key = run
                tl.store(run_ptr + row * n + at, run, mask=inside)
                tl.store(tier_ptr + row * n + at, tier.to(tl.int8), mask=inside)
                key = tl.where(tier == 3, key, tl.where(tier == 2, weight, 0.0))
                tier = tl.where(inside, tier, -1)
                here = tl.max(tier, 0)
                key = tl.where(tier == here, key, float("-inf"))
                highest, index = tl.max(key, 0, return_indices=True, return_indices_tie_break_left=True)
                better = (here > top) | ((here == top) & (highest > top_key))
                top, top_key = tl.where(better, here, top), tl.where(better, highest, top_key)
                top_at = tl.where(better, start + index, top_at)
            gain = tl.where(top == 3, top_key, tl.where(top == 2, 0.0, float("-inf")))
            tl.store(order_ptr + row * k + step, top_at.to(tl.int64))
            tl.store(gain_ptr + row * k + step, gain)
            tl.debug_barrier()
            new = top_at


@dataclass
class _Problem:
    """The state before the second token, which both backends go on from.

    Attributes:
        objective, metric, tau: As given to `farthest_point`.
        x: [b, n, c] features, normalised for cosines, of which a row of distances is taken at a time.
        matrix: [b, m, n] similarities or distances in fp32, held instead where there is one.
        weight: [b, n] fp32, or None; coverage has its weights in the matrix.
        tier: [b, n] int8.
        run: [b, n] the running number of the module's docstring; fp64 for coverage.
        limit: [b, n] residuals up to which a token depends on those chosen (dpp).
        best: [b, m] how well every row is covered.
        order, gain: [b, k], of which the first column is filled.
        plain: Whether every token is open until it is taken: there is no padding, and none that fills.
    """

    objective: str
    metric: str
    tau: float
    x: torch.Tensor
    matrix: torch.Tensor | None
    weight: torch.Tensor | None
    tier: torch.Tensor
    run: torch.Tensor
    order: torch.Tensor
    gain: torch.Tensor
    plain: bool = False
    limit: torch.Tensor | None = None
    best: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Similarity or distance of the tokens index [b, r] to all: [b, r, n]."""
        row = torch.arange(len(index), device=index.device)[:, None]
        if self.matrix is not None:
            return self.matrix[row, index]
        if self.metric == "cosine":
            return self.x[row, index] @ self.x.mT
        if index.shape[1] == 1:  # half the time, for memory like that of x
            return torch.linalg.vector_norm(self.x - self.x[row, index], dim=-1)[:, None]
        return torch.cdist(self.x[row, index], self.x, compute_mode=EXACT)

    def gap(self, value: torch.Tensor) -> torch.Tensor:
        """The distances behind what `rows` returns."""
        return value if self.metric in ("euclidean", "distance") else (1 - value).clamp_min_(0)

    def scores(self) -> torch.Tensor:
        """What the best token of the highest tier is looked for in, [b, n]."""
        if self.weight is None:
            return self.run.float()
        if self.objective == "suppress":
            return self.weight
        return self.run.float() if self.objective == "dpp" else self.run * self.weight

    def write(self, step: int, new: torch.Tensor | None = None) -> None:
        """Put the best token, or the given new [b, 1], and its gain into column `step`; it is then taken."""
        key = self.scores()
        if new is None and self.plain:
            gain, new = key.masked_fill(self.tier != OPEN, float("-inf")).max(1, keepdim=True)
            return self._take(step, new, gain)
        if new is None:
            top = self.tier.amax(1, keepdim=True)
            if self.objective in ("suppress", "dpp"):  # the others have no token that fills
                key = torch.where(self.tier == FILL, 1.0 if self.weight is None else self.weight, key)
            key = torch.where(self.tier == PADDING, 0.0, key).masked_fill_(self.tier != top, float("-inf"))
            key, new = key.max(1, keepdim=True)
        else:
            top, key = self.tier.gather(1, new), key.gather(1, new)
        self._take(step, new, torch.where(top == OPEN, key, torch.where(top == FILL, 0.0, float("-inf"))))

    def _take(self, step: int, new: torch.Tensor, gain: torch.Tensor) -> None:
        """Note the token new [b, 1] and its gain [b, 1] in column `step`."""
        self.order[:, step : step + 1], self.gain[:, step : step + 1] = new, gain
        self.tier.scatter_(1, new, TAKEN)

    def advance(self, step: int, factor: torch.Tensor | None) -> None:
        """Bring the state up to date with the token in column `step`; factor: [b, k, n] rows of dpp so far."""
        new = self.order[:, step : step + 1]
        if self.objective == "coverage":
            return self._cover(new)
        value = self.rows(new).squeeze(1)
        if self.objective == "max_sum":
            self.run += self.gap(value)
        elif self.objective != "dpp":
            self.run = torch.minimum(self.run, self.gap(value))
            if self.objective == "suppress":
                self.tier.masked_fill_((self.tier == OPEN) & (self.run < 1 - self.tau), FILL)
        else:
            if self.weight is not None:
                value = value * self.weight * self.weight.gather(1, new)
            pivot, live = self.run.gather(1, new), self.gain[:, step : step + 1] > 0
            past = factor[:, :step]
            value = value - (past.gather(2, new[:, None].expand(-1, step, -1)).mT @ past).squeeze(1)
            factor[:, step] = torch.where(live, value / torch.where(live, pivot, 1.0).sqrt(), 0.0)
            self.run = (self.run - factor[:, step].square()).clamp_min_(0)
            self.tier.masked_fill_((self.tier == OPEN) & (self.run <= self.limit), FILL)

    def _cover(self, new: torch.Tensor) -> None:
        """Coverage by the tokens new [b, 1]: only rows that they cover better than any before change a gain."""
        value = self.matrix.gather(2, new[:, None].expand(-1, self.matrix.shape[1], -1)).squeeze(2)
        sample, line = (value > self.best).nonzero(as_tuple=True)
        # all samples' rows below each other; two passes, for a clamp between tensors takes twice the time of both
        part = self.matrix.flatten(0, 1).index_select(0, sample * self.matrix.shape[1] + line)
        old, high = self.best[sample, line, None], value[sample, line, None]
        part = torch.maximum(torch.minimum(part, high, out=part), old, out=part)
        self.run.index_add_(0, sample, part.double().sub_(old), alpha=-1)
        self.best = torch.maximum(self.best, value)


def _prepare(
    x: torch.Tensor,
    k: int,
    objective: str,
    metric: str,
    start: str | int | torch.Tensor | None,
    valid: torch.Tensor | None,
    weight: torch.Tensor | None,
    tau: float,
) -> _Problem:
    """The arguments of `farthest_point`, checked, with the first token chosen."""
    _check(x, k, objective, metric, start, valid, weight, tau)
    b, n = len(x), x.shape[2 if metric in MATRICES else 1]
    there = torch.ones(b, n, dtype=torch.bool, device=x.device) if valid is None else valid
    weight = None if weight is None else weight.float()
    if metric not in MATRICES and valid is not None:
        x = x.masked_fill(~valid[..., None], 0)  # padding may hold anything, NaN too
    raw, x = x, x.float()
    matrix = x if metric in MATRICES else None
    if metric == "cosine":
        x = F.normalize(x, dim=-1, eps=TINY)
        if objective == "coverage" or (b * n * n <= HELD and (x.is_cuda or k * FEW > n)):
            matrix = _cosines(raw, x)
    p = _Problem(
        objective, metric, tau, x, matrix, weight, torch.where(there, OPEN, PADDING).to(torch.int8),
        torch.zeros(b, n, device=x.device), torch.empty(b, k, dtype=torch.int64, device=x.device),
        torch.empty(b, k, device=x.device), valid is None and objective not in ("suppress", "dpp"),
    )  # fmt: skip
    if objective in ("max_min", "suppress"):
        p.run.fill_(float("inf"))
    elif objective == "dpp":
        # of a cosine matrix the diagonal is 1, or 0 for a vector of zeros
        square = x.square().sum(-1).round() if metric == "cosine" else matrix.diagonal(dim1=1, dim2=2)
        p.run = square.clone() if weight is None else square * weight.square()
        p.limit = RESIDUAL * p.run
        p.tier.masked_fill_(there & (p.run <= 0), FILL)
    elif objective == "coverage":
        line = weight if weight is not None else torch.ones(matrix.shape[:2], device=x.device)
        if metric == "cosine":
            matrix.mul_((line * there)[..., None])
        elif weight is not None:
            p.matrix = matrix * line[..., None]
        p.matrix = p.matrix.contiguous()  # rows of all samples are picked from it at once
        p.best, p.weight = torch.zeros_like(line), None
        p.run = p.matrix.clamp_min(0).sum(1, dtype=torch.float64)
    if start is None and objective in ("coverage", "dpp", "suppress"):
        p.write(0)
    else:
        p.write(0, _first(p, "mean" if start is None else start, there, weight))
        if objective == "max_min":
            p.gain[:, 0] = float("inf")  # nothing yet to be far from
    return p


def _cosines(raw: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """All cosines [b, n, n] in fp32 of features [b, n, c], as given and normalised."""
    if not raw.is_cuda or raw.dtype not in (torch.float16, torch.bfloat16):
        return unit @ unit.mT
    # tensor cores multiply 16-bit numbers exactly and add in fp32: normalised afterwards, nothing is rounded
    scale = torch.linalg.vector_norm(raw, dim=-1, dtype=torch.float32).clamp_min(TINY).reciprocal()
    return torch.bmm(raw, raw.mT, out_dtype=torch.float32).mul_(scale[:, :, None]).mul_(scale[:, None])


def _first(
    p: _Problem, start: str | int | torch.Tensor, there: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """The token to begin with, [b, 1]."""
    b, n = there.shape
    if isinstance(start, torch.Tensor):
        return start.to(device=there.device, dtype=torch.int64).view(b, 1)
    if isinstance(start, int):
        return torch.full((b, 1), start, device=there.device)
    if start == "weight":
        value = weight
    elif start == "mean":
        mean = (p.x * there[..., None]).sum(1, keepdim=True) / there.sum(1).clamp_min(1)[:, None, None]
        value = (p.x @ mean.mT).squeeze(2) if p.metric == "cosine" else -(p.x - mean).square().sum(-1)
    else:  # the distance to the nearest other token, some rows at a time
        value, step = torch.empty(b, n, device=there.device), max(1, CHUNK // (b * n))
        for low in range(0, n, step):
            high = min(low + step, n)
            if p.matrix is None:
                some = p.rows(torch.arange(low, high, device=there.device).expand(b, -1))
            else:
                some = p.matrix[:, low:high]
            gap = p.gap(some) + torch.zeros(b, n, device=there.device).masked_fill_(~there, float("inf"))[:, None]
            gap.diagonal(offset=low, dim1=1, dim2=2).fill_(float("inf"))
            value[:, low:high] = gap.amin(-1)
    return value.masked_fill(~there, float("-inf")).argmax(1, keepdim=True)


@torch.no_grad()
def farthest_point_reference(
    x: torch.Tensor,
    k: int,
    *,
    objective: str = "max_min",
    metric: str = "cosine",
    start: str | int | torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    tau: float = 0.9,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, all samples at once: a loop over k alone. Arguments as `farthest_point`."""
    p = _prepare(x, k, objective, metric, start, valid, weight, tau)
    factor = torch.zeros(len(x), k, p.run.shape[1], device=x.device) if objective == "dpp" else None
    for step in range(1, k):
        p.advance(step - 1, factor)
        p.write(step)
    return p.order, p.gain


def _blocks(n: int, stream: bool, tiles: bool) -> tuple[dict[str, int], int]:
    """Tile sizes and warps: tokens in one piece where only a row is read, tiles of 8192 numbers otherwise."""
    block_n = min(1 << (n - 1).bit_length(), 128 if stream else 1024 if tiles else 4096)
    return {"BLOCK_N": block_n, "BLOCK_C": 64, "BLOCK_R": 8}, 16 if stream else 8 if block_n > 512 else 4


@torch.no_grad()
def _launch(x: torch.Tensor, k: int, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launcher; arguments as `farthest_point`."""
    p = _prepare(x, k, **options)
    (b, n), m = p.run.shape, 0 if p.best is None else p.best.shape[1]
    stream, cosine, scale = p.matrix is None, p.metric == "cosine", None
    matrix = x if stream else p.matrix.contiguous()
    if stream:
        # the kernel normalises as it reads, so that 16-bit features are read as such
        x = matrix = x.float() if x.dtype == torch.float64 else x
        if cosine:
            scale = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min(TINY).reciprocal()
    state = [None if t is None else t.contiguous() for t in (p.weight, p.tier, p.run, p.limit, p.best)]
    best = state.pop()
    blocks, warps = _blocks(n, stream, p.objective in ("coverage", "dpp"))
    factor = torch.empty(b, k, n, device=x.device) if p.objective == "dpp" else None
    lines = torch.empty(b, m, dtype=torch.int32, device=x.device) if m else None
    old = torch.empty(b, m, device=x.device) if m else None
    farthest_point_kernel[(b,)](
        x, scale, matrix, *state, factor, best, lines, old, p.order, p.gain,
        n, m, x.shape[-1], k, *x.stride(), *matrix.stride()[:2], p.tau,
        OBJECTIVE=p.objective, STREAM=stream, COSINE=cosine, DISTANCE=p.metric in ("euclidean", "distance"),
        HAS_WEIGHT=p.weight is not None, **blocks, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return p.order, p.gain


def _check(
    x: torch.Tensor,
    k: int,
    objective: str,
    metric: str,
    start: str | int | torch.Tensor | None,
    valid: torch.Tensor | None,
    weight: torch.Tensor | None,
    tau: float,
) -> None:
    for name, value, allowed in (("objective", objective, OBJECTIVES), ("metric", metric, METRICS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if x.dim() != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floating, [batch, tokens, ...], and not empty; got {x.dtype} {tuple(x.shape)}")
    b, m, n = x.shape
    if metric not in MATRICES:
        n = m
    elif objective != "coverage" and m != n:
        raise ValueError(f"a {metric} matrix must be square except for coverage; got {tuple(x.shape)}")
    if objective in ("suppress", "coverage", "dpp") and metric in ("euclidean", "distance"):
        raise ValueError(f"{objective} needs similarities: metric 'cosine' or 'similarity'; got {metric!r}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, the number of tokens; got {k}")
    rows = m if objective == "coverage" else n
    if weight is not None and weight.shape != (b, rows):
        raise ValueError(f"weight must be {(b, rows)}; got {tuple(weight.shape)}")
    if weight is None and (objective == "suppress" or (isinstance(start, str) and start == "weight")):
        raise ValueError(f"objective {objective!r} with start {start!r} needs a weight; got None")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (b, n)):
        raise ValueError(f"valid must be boolean {(b, n)}; got {valid.dtype} {tuple(valid.shape)}")
    if not isinstance(tau, int | float) or not -1 <= tau <= 1:
        raise ValueError(f"tau must be a cosine, in [-1, 1]; got {tau!r}")
    if start is None and objective in ("max_min", "max_sum"):
        start = "mean"
    if isinstance(start, torch.Tensor):
        if start.shape != (b,) or start.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"start must be int32 or int64 positions ({b},); got {start.dtype} {tuple(start.shape)}")
    elif isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))} or a position; got {start!r}")
        if start == "mean" and metric in MATRICES:
            raise ValueError(f"start 'mean' needs features, which metric {metric!r} has none of")
        if start == "weight" and rows != n:
            raise ValueError(f"start 'weight' needs a weight for every one of the {n} tokens; got {rows}")
    elif start is not None and not (type(start) is int and 0 <= start < n):
        raise ValueError(f"start must lie in 0..{n - 1}; got {start!r}")


def farthest_point(
    x: torch.Tensor,
    k: int,
    *,
    objective: str = "max_min",
    metric: str = "cosine",
    start: str | int | torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    tau: float = 0.9,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy choice of k tokens a sample; deterministic, ties to the lower position.

    Cosines are held as an n x n matrix while the batch's fit into 256 MiB, for coverage always: every gain needs it.

    Args:
        x: [b, n, c] features; for metric "similarity" or "distance" the matrix [b, n, n] itself (coverage: [b, m, n],
            m rows to be covered by n tokens).
        k: 1..n.
        objective: What each token adds (formulas above): "max_min" (DivPrune; with weights ZOO-Prune), "max_sum"
            (ToDRE), "suppress" (GreedyPrune: the heaviest that resembles none chosen by more than tau), "coverage"
            (MMTok; facility location, where a negative similarity covers nothing), "dpp" (CDPruner, Script).
        metric: "cosine", "euclidean", "similarity" or "distance".
        start: First token: "mean" (nearest the mean), "isolated" (whose nearest neighbour is farthest, DivPrune),
            "weight" (heaviest, ZOO-Prune), a position or one for every sample [b]. None leaves it to the objective;
            those of distances, which an empty set says nothing about, then take "mean".
        valid: [b, n] boolean, False = padding, which comes last and covers nothing, or needs none of it.
        weight: [b, n] non-negative: factor on distances, quality in the kernel of dpp, what suppress ranks by; for
            coverage how much every row counts, [b, m].
        tau: Greatest cosine between two tokens of "suppress".

    Returns:
        (order [b, k] positions as they were chosen, gain [b, k] in fp32). The gain is what the objective says above;
        inf for the first of max_min, 0 for tokens that fill up the number (suppress: all others are too similar; dpp:
        they depend on those chosen), which follow by weight, and -inf for padding.

    Raises:
        ValueError: If a shape, a choice or k does not fit.

    Source: DivPrune (2503.02175), MMTok, CDPruner; greedy MAP inference of a DPP: Chen et al. 2018 (1709.05135).

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [10.0], [4.0]]])
        >>> farthest_point(x, 3, metric="euclidean", start=0)
        (tensor([[0, 2, 3]]), tensor([[inf, 10.,  4.]]))
    """
    options = {
        "objective": objective, "metric": metric, "start": start, "valid": valid, "weight": weight, "tau": tau
    }  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):  # in bf16 other tokens are the farthest
        if use_triton(x, valid, weight):
            return _launch(x, k, options)
        return farthest_point_reference(x, k, **options)


def compile_specs() -> list[CompileSpec]:
    """Every objective on a held matrix, and bf16 features read row by row, up to 4096 tokens of 4096 channels."""
    signature = {"order_ptr": "*i64", "tier_ptr": "*i8", "gain_ptr": "*fp32", "tau": "fp32"}
    signature |= dict.fromkeys(("n", "m", "c", "k", "x_b", "x_n", "matrix_b", "matrix_m"), "i32")
    specs = []
    for n, stream, objective, weighted in (
        (576, False, "max_min", True), (4096, False, "max_sum", False), (4096, False, "suppress", True),
        (576, False, "coverage", False), (4096, False, "coverage", False), (4096, False, "dpp", True),
        (576, True, "max_min", False), (4096, True, "max_min", True), (4096, True, "dpp", True),
    ):  # fmt: skip
        coverage, dpp, kind = objective == "coverage", objective == "dpp", "*bf16" if stream else "*fp32"
        pointers = {"x_ptr": kind, "matrix_ptr": kind, "run_ptr": "*fp64" if coverage else "*fp32"}
        optional = {
            "scale_ptr": stream, "weight_ptr": weighted, "limit_ptr": dpp, "factor_ptr": dpp, "best_ptr": coverage,
            "old_ptr": coverage,
        }  # fmt: skip
        pointers |= {name: "*fp32" for name, given in optional.items() if given}
        constexprs = {name: None for name, given in optional.items() if not given}
        (pointers if coverage else constexprs)["list_ptr"] = "*i32" if coverage else None
        blocks, warps = _blocks(n, stream, coverage or dpp)
        constexprs |= {"x_c": 1, "OBJECTIVE": objective, "STREAM": stream, "COSINE": True, "DISTANCE": False}
        constexprs |= {"HAS_WEIGHT": weighted, **blocks}
        specs.append(CompileSpec(farthest_point_kernel, signature | pointers, constexprs, num_warps=warps))
    return specs
