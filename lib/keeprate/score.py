"""Score: which tokens matter? Pure functions on tensors; every result is fp32 and higher means keep.

Attention is read from an `AttentionView`, which computes a few rows or the column sums, so that no function here builds
an n x n matrix of attention, `pagerank` apart.
"""

import torch
import torch.nn.functional as F

from keeprate.attention import AttentionView
from keeprate.check import choice


def attention_from(view: AttentionView, rows: int | list[int] | torch.Tensor, prefix: int = 0) -> torch.Tensor:
    """Attention that given query rows pay to every token, mean over the rows, by head.

    Row 0 of a vision encoder with a class token is the class attention of EViT; the last row of a language model's
    prompt is the text attention of FastV and its relatives.

    Args:
        view: An attention layer.
        rows: Query rows.
        prefix: Leading tokens to leave out of the result.

    Returns:
        [b, h, n - prefix].
    """
    return view.rows(rows).mean(2)[..., prefix:]


def attention_received(view: AttentionView, prefix: int = 0, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Attention that every token receives, mean over query rows, by head; needs no class token.

    Args:
        view: An attention layer.
        prefix: Leading tokens to leave out of the result.
        valid: [b, n_q] which query rows are real; None = all.

    Returns:
        [b, h, n - prefix].
    """
    if valid is None:
        return view.received()[..., prefix:] / view.q.shape[2]
    weight = valid.float()[:, None]
    return view.received(weight)[..., prefix:] / weight.sum(-1, keepdim=True)


def value_norm(v: torch.Tensor, per_head: bool = False) -> torch.Tensor:
    """Euclidean norm of each token's value, heads concatenated [b, g, n, d] -> [b, n], or per head -> [b, g, n]."""
    norm = v.float().square().sum(-1)
    return (norm if per_head else norm.sum(1)).sqrt()


def pagerank(probs: torch.Tensor, iterations: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted PageRank on the attention graph by power iteration, without damping.

    s(t+1)[j] = sum_i P[i, j] s(t)[i], from s(0) = start, normalised to sum 1.

    Args:
        probs: [b, h, n, n] attention probabilities, rows sum to 1.
        iterations: Power iterations; one from the uniform start is the mean attention received.
        start: [n] non-negative initial scores; uniform when None.

    Returns:
        [b, h, n], non-negative, each row sums to 1.

    Raises:
        ValueError: If iterations < 1.

    Source: Zero-TPrune (2305.17328), Weighted Page Rank.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    n = probs.shape[-1]
    start = torch.ones(n, device=probs.device) if start is None else start.float()
    s = (start / start.sum()).expand(*probs.shape[:2], 1, n)
    for _ in range(iterations):
        s = s @ probs.float()
        s = s / s.sum(-1, keepdim=True)
    return s.squeeze(2)


def rms_of_heads(scores: torch.Tensor, low: float = 0.0, high: float = float("inf")) -> torch.Tensor:
    """Root mean square over the heads whose scores vary by a useful amount.

    The variance of a head is taken over its tokens after rescaling the head to mean 1; heads outside [low, high] are
    left out, and all heads are used where none passes.

    Args:
        scores: [b, h, n].
        low, high: Bounds on the variance.

    Returns:
        [b, n].

    Source: Zero-TPrune (2305.17328), variance-based head filter and emphasising-informative-region aggregation.
    """
    scores = scores.float()
    variance = (scores / scores.mean(-1, keepdim=True).clamp_min(1e-12)).var(-1, unbiased=False)
    use = (variance >= low) & (variance <= high)
    use = (use | ~use.any(1, keepdim=True)).float()[..., None]
    return ((scores.square() * use).sum(1) / use.sum(1)).sqrt()


def similarity(metric: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Cosine similarity: metric [b, n, c] against other [b, m, c] (itself when None) -> [b, n, m] in fp32."""
    a = F.normalize(metric.float(), dim=-1)
    b = a if other is None else F.normalize(other.float(), dim=-1)
    with torch.autocast(metric.device.type, enabled=False):  # which would round to two or three digits
        return a @ b.transpose(-1, -2)


def energy(metric: torch.Tensor, margin: float, alpha: float = 1.0) -> torch.Tensor:
    """Energy of a token: how many others resemble it. HIGH energy means redundant, so callers keep the lowest.

    E[i] = mean_j f(cos(k_i, k_j)),  f(x) = x for x >= margin, alpha (exp(x - margin) - 1) below.

    Args:
        metric: [b, n, c].
        margin: Similarity above which two tokens count as redundant.
        alpha: Depth of the penalty for dissimilar tokens.

    Returns:
        [b, n].

    Source: PiToMe (2405.16148), energy score.
    """
    sim = similarity(metric)
    return torch.where(sim >= margin, sim, alpha * torch.expm1(sim - margin)).mean(-1)


def density(gap: torch.Tensor, neighbours: int = 5) -> torch.Tensor:
    """Local density exp(-mean of the squared distances to the k nearest tokens, itself included).

    A floor of 1e-6 keeps isolated tokens above zero, so that their separation still counts; the published code adds
    random noise of that size to break ties, `separation` breaks them by position.

    Args:
        gap: [b, n, n] distances (`distance`).
        neighbours: k, at most n.

    Returns:
        [b, n].

    Source: DPC-KNN as used by TCFormer (2204.08680).
    """
    near = gap.topk(min(neighbours, gap.shape[1]), largest=False).values
    return near.square().mean(-1).neg().exp() + 1e-6


def separation(gap: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest token of higher density, or of equal density and earlier; the densest gets its greatest.

    Args:
        gap: [b, n, n] distances.
        rho: [b, n] densities.

    Returns:
        [b, n].

    Source: DPC-KNN as used by TCFormer (2204.08680).
    """
    index = torch.arange(rho.shape[1], device=rho.device)
    other, own = rho[:, None, :], rho[:, :, None]
    denser = (other > own) | ((other == own) & (index < index[:, None]))  # b i j: j is denser than i
    nearest = gap.masked_fill(~denser, float("inf")).amin(-1)
    return torch.where(nearest.isinf(), gap.amax(-1), nearest)


def distance(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances over sqrt(dim): [b, n, d] -> [b, n, n], exactly zero on the diagonal."""
    x = x.float()
    gap = torch.cdist(x, x) / x.shape[-1] ** 0.5
    return gap.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0.0)


def random(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform noise from the caller's own generator, drawn on the CPU so that every device sees the same."""
    return torch.rand(shape, generator=generator).to(device)


def radial(grid: tuple[int, int], norm: float = 2.0) -> torch.Tensor:
    """Closeness to the centre of the image, the same for every input.

    Args:
        grid: Rows and columns of patches.
        norm: 1, 2 or inf: the norm of the offset from the centre.

    Returns:
        [rows * cols], 0 at the centre and negative outwards.

    Source: the fixed radial patterns of Which Tokens to Use (2308.04657).
    """
    rows, cols = (torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in grid)
    offset = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)
    return -torch.linalg.vector_norm(offset, ord=norm, dim=-1)


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Largest class probability of each token: [b, n, classes] -> [b, n]."""
    return logits.float().softmax(-1).amax(-1)


# --- cached keys and values ------------------------------------------------------------------------------------------


def by_kv_head(x: torch.Tensor, kv_heads: int, reduce: str = "mean") -> torch.Tensor:
    """Reduce the query heads that share a key head: [b, h, ...] -> [b, g, ...].

    Args:
        x: Any tensor with query heads on axis 1; head i belongs to KV head i // (h / g).
        kv_heads: g, a divisor of h.
        reduce: "mean", "sum" or "max".

    Raises:
        ValueError: If g does not divide h, or on an unknown `reduce`.
    """
    choice("reduce", reduce, ("mean", "sum", "max"))
    if x.shape[1] % kv_heads:
        raise ValueError(f"the {x.shape[1]} query heads cannot be shared among {kv_heads} KV heads")
    grouped = x.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if reduce == "max" else getattr(grouped, reduce)(2)


def pool(scores: torch.Tensor, kernel: int, mode: str = "avg", valid: torch.Tensor | None = None) -> torch.Tensor:
    """Smooth scores along the tokens, so that a kept token brings its neighbours: [..., n] -> [..., n].

    Args:
        scores: [..., n]; nothing lies beyond the ends, where fewer tokens are pooled.
        kernel: Odd width of the window.
        mode: "avg" or "max".
        valid: [..., n] tokens that exist; the others take no part.

    Raises:
        ValueError: On an even kernel or an unknown mode.

    Source: SnapKV (2404.14469), clustering by pooling.
    """
    choice("mode", mode, ("avg", "max"))
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be an odd number of tokens; got {kernel!r}")
    rows = scores.float().reshape(-1, 1, scores.shape[-1])
    there = torch.ones_like(rows) if valid is None else valid.expand_as(scores).reshape(rows.shape).float()
    if mode == "max":
        pooled = F.max_pool1d(rows.masked_fill(there == 0, float("-inf")), kernel, 1, kernel // 2)
    else:
        mass = F.avg_pool1d(rows.masked_fill(there == 0, 0.0), kernel, 1, kernel // 2)
        pooled = mass / F.avg_pool1d(there, kernel, 1, kernel // 2).clamp_min(1e-12)
    return pooled.view_as(scores)


def eviction_error(weight: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
    """How far the attention output moves when one token goes: a / (1 - a) * ||o - v||, exactly.

    Args:
        weight: [b, g, ..., n] non-negative, any number of query rows between; normalised to sum 1 here.
        v: [b, g, n, d] values.
        output: [b, g, ..., d]; sum_k a_k v_k when None.

    Returns:
        [b, g, ..., n].

    Source: CAOTE (2504.14051), closed form of the eviction error.
    """
    shape, v = weight.shape, v.float()
    a = weight.float().reshape(*shape[:2], -1, shape[-1])  # b g q n
    a = a / a.sum(-1, keepdim=True).clamp_min(1e-12)
    o = a @ v if output is None else output.float().reshape(*shape[:2], -1, v.shape[-1])  # b g q d
    # ||o - v||^2 without a difference for every pair
    gap = v.square().sum(-1)[:, :, None] - 2 * o @ v.transpose(-1, -2) + o.square().sum(-1, keepdim=True)
    return (a / (1 - a).clamp_min(1e-6) * gap.clamp_min(0.0).sqrt()).view(shape)
