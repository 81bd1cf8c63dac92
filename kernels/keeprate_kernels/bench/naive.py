"""What the ops replace, as everybody writes it: the code they are timed against."""

import torch
import torch.nn.functional as F


def attention_matrix(
    query: torch.Tensor, key: torch.Tensor, causal: bool, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """softmax(Q K^T) written out, in `dtype`, the last rows of a causal context: [b, h, n_q, n_k]."""
    n_q, n_k = query.shape[2], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(-1, dtype=dtype)


def softmax_then_sum(query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention received, from the whole matrix: [b, h, n_k]."""
    return attention_matrix(query, key, causal).sum(2)


def log_sum_exp(query: torch.Tensor, key: torch.Tensor, causal: bool, chunk: int = 256) -> torch.Tensor:
    """Log of every query row's softmax denominator, as flash attention has it anyway: [b, h, n_q] in fp32."""
    b, h, n, d = query.shape
    groups = key.shape[1]
    rows = []
    for start in range(0, n, chunk):
        part = query[:, :, start : start + chunk]
        m = part.shape[2]
        # query heads that share a key head are stacked as rows
        logits = (part.reshape(b, groups, h // groups * m, d) @ key.transpose(-1, -2)).view(b, h, m, -1).float()
        logits *= d**-0.5
        if causal:
            seen = torch.arange(n, device=query.device) <= torch.arange(start, start + m, device=query.device)[:, None]
            logits = logits.masked_fill(~seen, float("-inf"))
        rows.append(logits.logsumexp(-1))
    return torch.cat(rows, 2)


def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One decode step over the whole cache: query [b, h, 1, d] -> [b, h, 1, d].

    The query heads of a group are rows of one SDPA call, which reads every key once; on a CPU that takes a third of the
    time of `enable_gqa`.
    """
    b, h, _, d = query.shape
    return F.scaled_dot_product_attention(query.view(b, key.shape[1], -1, d), key, value).view(b, h, 1, d)


def gather_pairs(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each head's tokens index [b, g, m], each by torch.gather: [b, g, m, d]."""
    index = index[..., None].expand(-1, -1, -1, key.shape[-1])
    return key.gather(2, index), value.gather(2, index)


def best_match(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine and its destination for every source token, from the whole matrix: [b, s]."""
    cosine = F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).transpose(-1, -2)
    return cosine.max(-1)


def farthest_point_loop(x: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min selection by cosine, a few launches a token, from the first token on: [b, k] as chosen."""
    unit = F.normalize(x, dim=-1)
    distance = 1 - unit @ unit.mT  # b n n
    row = torch.arange(len(x), device=x.device)
    chosen = [torch.zeros_like(row)]
    nearest = distance[:, 0]
    for _ in range(k - 1):
        chosen.append(nearest.argmax(-1))
        nearest = torch.minimum(nearest, distance[row, chosen[-1]])
    return torch.stack(chosen, 1)


def logits_statistics(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss, entropy, mean and variance of log p of every token, from its logits: [t] each."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(-1)
    return -log_p.gather(-1, labels[:, None])[:, 0], -mean, mean, variance


def logits_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The forward pass of the usual loss, token by token: [t]."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def round_to_byte(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric rounding to 256 levels along `dim`, one byte a number, nothing packed: (codes, low, step)."""
    low, high = x.aminmax(dim=dim, keepdim=True)
    step = (high - low) / 255
    return ((x - low) / step).round().to(torch.uint8), low, step
