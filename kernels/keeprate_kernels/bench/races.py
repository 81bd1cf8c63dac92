"""What is timed against what: a generator of races for every op.

Sizes are those of the acceptance bars on a GPU (Llama-3-8B's attention: 32 query heads, 8 key heads, D 128, bf16) and a
quarter of that on a CPU. Byte and FLOP counts are the least the result needs, not what an implementation spends.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import keeprate_kernels as kernels
from keeprate_kernels.bench import naive
from keeprate_kernels.bench.bars import ALL, ALL_STATISTICS, BUDGET, FULL, KNOWN, LOOP, LOSS, SDPA, WINDOW
from keeprate_kernels.bench.record import Line, Race

ROWS = 64  # query rows of an observation window
LSE = "log-sum-exp of the rows"
SUMMED = "softmax, then sum"


def compiled(function: Callable) -> Callable:
    """The function under torch.compile for exactly the shapes it is called with; built at its first call."""
    torch._dynamo.reset()  # a second shape would make it compile a slower one for all shapes
    return torch.compile(function, dynamic=False)


def size_of(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty(0, dtype=dtype).element_size()


def draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal numbers, the same ones in every run on a device."""
    g = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=g, device=device, dtype=dtype) for shape in shapes]


def attention_received(gpu: bool, quick: bool) -> Iterator[Race]:
    """All rows with and without known log-sum-exp, and a window, against SDPA and against softmax, then sum."""
    dtype = torch.bfloat16 if gpu else torch.float32
    (h, g, d), most = ((32, 8, 128), 65536) if gpu else ((8, 2, 64), 8192)
    shapes = [(h, g, n) for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536) if n <= most]
    if gpu:
        shapes = [shape for shape in shapes if shape[2] not in (2048, 8192, 32768)]
    else:
        shapes.append((h, h, 4096))  # without groups
    for h, g, n in [(4, 2, 128)] if quick else shapes:
        for causal in (False, True):
            yield _attention_received(
                h, g, n, 16 if quick else d, dtype, causal, compiles=(h, n) in ((32, 4096), (8, 4096)) and g < h
            )


def _attention_received(h, g, n, d, dtype, causal, compiles) -> Race:
    scaling, s = d**-0.5, size_of(dtype)

    def build(device):
        q, k, v = draw(device, dtype, (1, h, n, d), (1, g, n, d), (1, g, n, d))
        last, lse = q[:, :, -ROWS:], naive.log_sum_exp(q, k, causal)
        received = kernels.attention_received
        calls = {
            SDPA: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
            ALL: lambda: received(q, k, scaling=scaling, causal=causal),
            KNOWN: lambda: received(q, k, scaling=scaling, causal=causal, lse=lse),
            LSE: lambda: kernels.attention_lse(q, k, scaling=scaling, causal=causal),
            WINDOW: lambda: received(last, k, scaling=scaling, causal=causal),
            SUMMED: lambda: naive.softmax_then_sum(q, k, causal),
            f"{SUMMED} (window)": lambda: naive.softmax_then_sum(last, k, causal),
        }
        if compiles:
            whole = compiled(naive.softmax_then_sum)
            calls[f"compiled {SUMMED}"] = lambda: whole(q, k, causal)
        return calls

    mask = "causal" if causal else "not causal"
    out, keys = 4 * h * n, s * g * n * d
    rows = {
        # (bytes, flops): Q, K, (log-sum-exp) and the result; one product Q K^T, half of it under a causal mask
        ALL: (s * h * n * d + keys + out, 2 * h * n * n * d // (2 if causal else 1)),
        KNOWN: (s * h * n * d + keys + 2 * out, 2 * h * n * n * d // (2 if causal else 1)),
        WINDOW: (s * h * min(ROWS, n) * d + keys + out, 2 * h * min(ROWS, n) * n * d),
    }
    lines = []
    for case, cost in rows.items():
        summed = f"{SUMMED} (window)" if case == WINDOW else SUMMED
        lines += [Line(f"{case}, {mask}", case, against, *cost) for against in (SDPA, summed)]
    lines.append(Line(f"{LSE}, {mask}", LSE, SDPA, *rows[ALL]))
    if compiles:
        lines.append(Line(f"{ALL}, {mask}", ALL, f"compiled {SUMMED}", *rows[ALL]))
    needs = dict.fromkeys((SUMMED, f"compiled {SUMMED}"), (2 * s + 8) * h * n * n)
    return Race("attention_received", f"b1 h{h} g{g} n{n} d{d}", n, dtype, build, tuple(lines), needs)


def selected_attention(gpu: bool, quick: bool) -> Iterator[Race]:
    """A decode step over an index list of every head, against one over the whole cache and against gathering first."""
    dtype = torch.bfloat16 if gpu else torch.float32
    h, g, d = (4, 2, 16) if quick else (32, 8, 128)
    batches = [1, 16] if gpu and not quick else [1]
    for b, n in [(b, n) for b in batches for n in ([128] if quick else [4096, 16384, 65536])]:
        budgets = [m for m in ([32] if quick else [256, BUDGET, 4096]) if m < n and (b == 1 or m == BUDGET)]

        def build(device, b=b, n=n, budgets=budgets):
            q, k, v = draw(device, dtype, (b, h, 1, d), (b, g, n, d), (b, g, n, d))
            calls = {FULL: lambda: naive.decode(q, k, v)}
            for m in budgets:
                index = picked(device, b, g, n, m)
                calls[f"budget {m}"] = lambda index=index: kernels.selected_attention(q, k, v, index, scaling=d**-0.5)
                calls[f"gather {m}, then decode"] = lambda index=index: naive.decode(
                    q, *naive.gather_pairs(k, v, index)
                )
            return calls

        lines = []
        for m in budgets:
            cost = b * (size_of(dtype) * (2 * g * m * d + 2 * h * d) + 8 * g * m), 4 * b * h * m * d
            lines += [Line(f"budget {m}", f"budget {m}", x, *cost) for x in (FULL, f"gather {m}, then decode")]
        yield Race("selected_attention", f"b{b} h{h} g{g} n{n} d{d}", n, dtype, build, tuple(lines))


def picked(device: torch.device, b: int, g: int, n: int, m: int) -> torch.Tensor:
    """m of n tokens of every head, sorted: [b, g, m]."""
    scores = torch.rand(b, g, n, generator=torch.Generator().manual_seed(0))
    return scores.topk(m, -1).indices.sort(-1).values.to(device)


def compact_kv(gpu: bool, quick: bool) -> Iterator[Race]:
    """Keys and values of the kept tokens in new memory, against torch.gather on each."""
    dtype = torch.bfloat16 if gpu else torch.float32
    b, g, d = (2, 2, 16) if quick else (16, 8, 128) if gpu else (1, 8, 128)
    for n in [128] if quick else [4096, 16384] if gpu else [4096, 16384, 65536]:
        for keep in (0.5, 0.1):
            m = round(keep * n)

            def build(device, n=n, m=m):
                k, v = draw(device, dtype, (b, g, n, d), (b, g, n, d))
                index = picked(device, b, g, n, m)
                return {
                    "compact": lambda: kernels.compact_kv(k, v, index),
                    "torch.gather": lambda: naive.gather_pairs(k, v, index),
                }

            moved = b * g * m * (4 * d * size_of(dtype) + 8)
            lines = (Line(f"keep {keep:g}", "compact", "torch.gather", moved),)
            yield Race("compact_kv", f"b{b} g{g} n{n} d{d}", n, dtype, build, lines)


def bipartite_match(gpu: bool, quick: bool) -> Iterator[Race]:
    """ToMe's alternating halves against the matrix of all similarities: images in a batch, long videos."""
    dtype = torch.bfloat16 if gpu else torch.float32
    sizes = [(256, 197, 64), (16, 576, 1024), (1, 4096, 1024), (1, 16384, 1024), (1, 65536, 1024)]
    if not gpu:
        sizes = [(32, 197, 64), (4, 576, 256), (1, 4096, 256), (1, 16384, 256)]
    for b, n, c in [(2, 65, 16)] if quick else sizes:
        source, target = torch.arange(n)[::2], torch.arange(n)[1::2]
        s, t = len(source), len(target)

        def build(device, b=b, n=n, c=c, source=source, target=target):
            (x,) = draw(device, dtype, (b, n, c))
            source, target = source.to(device), target.to(device)
            calls = {
                "match": lambda: kernels.bipartite_match(x, source, target),
                "matrix": lambda: naive.best_match(x[:, ::2], x[:, 1::2]),
            }
            if n == 4096:
                whole = compiled(naive.best_match)
                calls["compiled matrix"] = lambda: whole(x[:, ::2], x[:, 1::2])
            return calls

        cost = b * (size_of(dtype) * n * c + 12 * s), 2 * b * s * t * c
        names = ("matrix", *(("compiled matrix",) if n == 4096 else ()))
        lines = tuple(Line("best of the other half", "match", name, *cost) for name in names)
        needs = {"matrix": 3 * size_of(dtype) * b * s * t}
        yield Race("bipartite_match", f"b{b} n{n} c{c}", n, dtype, build, lines, needs)


def farthest_point(gpu: bool, quick: bool) -> Iterator[Race]:
    """Max-min selection by cosine, starting at the first token, against a loop of torch calls."""
    dtype = torch.bfloat16 if gpu else torch.float32
    for b, n, c, k in [(2, 40, 16, 8)] if quick else [(16, 576, 1024, 64), (1, 2880, 1024, 320)]:

        def build(device, b=b, n=n, c=c, k=k):
            (x,) = draw(device, dtype, (b, n, c))
            return {
                "greedy": lambda: kernels.farthest_point(x, k, objective="max_min", metric="cosine", start=0),
                LOOP: lambda: naive.farthest_point_loop(x, k),
            }

        # a cosine with each chosen token is all that is needed
        cost = b * (size_of(dtype) * n * c + 12 * k), 2 * b * n * c * k
        lines = (Line(f"keep {k}", "greedy", LOOP, *cost),)
        yield Race("farthest_point", f"b{b} n{n} c{c}", n, dtype, build, lines, wall=True)


def quantise_kv(gpu: bool, quick: bool) -> Iterator[Race]:
    """Packing and unpacking keys and values against copying them, and against plain rounding to a byte a number."""
    dtype = torch.bfloat16 if gpu else torch.float32
    g, n, d = (2, 64, 16) if quick else (8, 65536, 128) if gpu else (8, 8192, 128)
    for bits in (2, 4, 8):

        def build(device, bits=bits):
            k, v = draw(device, dtype, (1, g, n, d), (1, g, n, d))
            packed = kernels.quantise_kv(k, v, bits)
            calls = {
                "quantise": lambda: kernels.quantise_kv(k, v, bits),
                "dequantise": lambda: (packed[0].dequantise(), packed[1].dequantise()),
                "copy": lambda: (k.clone(), v.clone()),
                "plain rounding": lambda: (naive.round_to_byte(k, 2), naive.round_to_byte(v, 3)),
            }
            if bits == 8 and not quick:
                plain = compiled(naive.round_to_byte)
                calls["compiled plain rounding"] = lambda: (plain(k, 2), plain(v, 3))
            return calls

        moved = 2 * g * n * d * size_of(dtype) + 2 * g * n * d * bits // 8
        lines = [Line(f"{case}, {bits} bits", case, "copy", moved) for case in ("quantise", "dequantise")]
        lines.append(Line(f"quantise, {bits} bits", "quantise", "plain rounding", moved))
        if bits == 8 and not quick:
            lines.append(Line(f"quantise, {bits} bits", "quantise", "compiled plain rounding", moved))
        yield Race("quantise_kv", f"b1 g{g} n{n} d{d}", n, dtype, build, tuple(lines))


def token_stats(gpu: bool, quick: bool) -> Iterator[Race]:
    """What a language model thinks of every token, against the logits path; n is the size of the vocabulary."""
    dtype = torch.bfloat16 if gpu else torch.float32
    t, c = (33, 16) if quick else (8192, 4096) if gpu else (512, 512)
    for v in [257] if quick else [32768, 131072]:

        def build(device, v=v):
            hidden, weight = draw(device, dtype, (t, c), (v, c))
            hidden, weight = hidden * 4, weight / c**0.5  # logits as spread as a trained model's
            labels = torch.randint(v, (t,), generator=torch.Generator().manual_seed(0)).to(device)
            inputs = hidden, weight, labels
            calls = {
                "stats": lambda: kernels.token_stats(*inputs),
                "loss": lambda: kernels.token_stats(*inputs, stats=("nll",)),
                "logits, then all statistics": lambda: naive.logits_statistics(*inputs),
                LOSS: lambda: naive.logits_loss(*inputs),
            }
            if v == 32768:
                whole = compiled(naive.logits_statistics)
                calls["compiled logits, then all statistics"] = lambda: whole(*inputs)
            if hasattr(F, "linear_cross_entropy"):  # torch 2.13
                calls["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(*inputs, reduction="none")
            return calls

        cost = size_of(dtype) * (t + v) * c + (8 + 5 * 4) * t, 2 * t * c * v
        statistics = ["logits, then all statistics", LOSS]
        statistics += ["compiled logits, then all statistics"] if v == 32768 else []
        lines = [Line(ALL_STATISTICS, "stats", against, *cost) for against in statistics]
        fused = ["F.linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []
        lines += [Line("loss only", "loss", against, *cost) for against in (LOSS, *fused)]
        needs = {name: (size_of(dtype) + 12) * t * v for name in statistics}
        yield Race("token_stats", f"t{t} c{c} V{v}", v, dtype, build, tuple(lines), needs)


def kept_rows_ce(gpu: bool, quick: bool) -> Iterator[Race]:
    """Training on some tokens after scoring all, against the logits path with the others' losses times zero."""
    dtype = torch.bfloat16 if gpu else torch.float32
    t, c, v = (33, 16, 257) if quick else (8192, 4096, 131072) if gpu else (512, 512, 32768)
    for keep in (0.6, 0.3):

        def build(device, keep=keep):
            hidden, weight = draw(device, dtype, (t, c), (v, c))
            hidden, weight = (hidden * 4).requires_grad_(), (weight / c**0.5).requires_grad_()
            g = torch.Generator().manual_seed(0)
            labels = torch.randint(v, (t,), generator=g).to(device)
            kept = (torch.randperm(t, generator=g) < round(keep * t)).to(device)
            inputs = hidden, weight, labels
            with torch.no_grad():
                known = kernels.token_stats(*inputs, stats=("nll",))

            def gradients(nll):
                return torch.autograd.grad((nll * kept).sum() / kept.sum(), (hidden, weight))

            def ours(stats):
                loss, _ = kernels.kept_rows_ce(*inputs, kept, denominator=kept.sum(), stats=stats)
                return torch.autograd.grad(loss, (hidden, weight))

            calls = {
                "kept": lambda: ours(None),
                "kept, scored before": lambda: ours(known),
                "logits": lambda: gradients(naive.logits_loss(*inputs)),
            }
            if hasattr(F, "linear_cross_entropy"):  # torch 2.13
                calls["F.linear_cross_entropy"] = lambda: gradients(F.linear_cross_entropy(*inputs, reduction="none"))
            return calls

        moved, product = size_of(dtype) * 2 * (t + v) * c, 2 * t * c * v
        score, backward = product, 3 * round(keep * t) * 2 * c * v
        baselines = ["logits", *(["F.linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else [])]
        lines = [Line(f"score all, train on {keep:g}", "kept", x, moved, score + backward) for x in baselines]
        lines.append(Line(f"scored before, train on {keep:g}", "kept, scored before", "logits", moved, backward))
        needs = {"logits": (3 * size_of(dtype) + 12) * t * v}
        yield Race("kept_rows_ce", f"t{t} c{c} V{v}", v, dtype, build, tuple(lines), needs)


RACES = {
    "attention_received": attention_received,
    "selected_attention": selected_attention,
    "compact_kv": compact_kv,
    "bipartite_match": bipartite_match,
    "farthest_point": farthest_point,
    "quantise_kv": quantise_kv,
    "token_stats": token_stats,
    "kept_rows_ce": kept_rows_ce,
}
