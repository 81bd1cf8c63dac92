"""attention_received against float64, at awkward sizes, with every kind of mask, in low precision, in O(n) memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import attention_lse, attention_received, attention_rows
from keeprate_kernels.runtime import backend

from .checks import DTYPES, SIZES, needs_triton, three_way
from .checks import rand as rand_device


def rand(seed: int, *shape: int) -> torch.Tensor:
    return rand_device(seed, *shape).cpu()  # the reference is tested on a CPU, wherever the tests run


def truth(q, k, scaling, mask=None, causal=False, dtype=torch.float64) -> torch.Tensor:
    """[b, h, n_q, n_k] probabilities written out; rows that see nothing are zero."""
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(dtype)
    if causal:
        n_q, n_k = logits.shape[-2:]
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0)


def seeing(shape, mask=None, causal=False) -> torch.Tensor:
    """Which row may see which key, written out: boolean of `shape` [b, h, n_q, n_k]."""
    n_q, n_k = shape[-2:]
    seen = torch.ones(shape, dtype=torch.bool, device=None if mask is None else mask.device)
    seen = seen.tril(n_k - n_q) if causal else seen
    return seen if mask is None else seen & (mask if mask.dtype == torch.bool else mask > -1e30)


def statistic(probs, weight, reduce, group, g, seen) -> torch.Tensor:
    """The definition: probs [b, h, n_q, n_k] -> [b, h or g, n_k]."""
    weight = torch.ones(probs.shape[2]) if weight is None else weight
    weight = weight.to(probs).expand(probs.shape[:3])[..., None]
    found = (probs * weight).amax(2) if reduce == "max" else (probs * weight).sum(2)
    if reduce == "mean":
        found = (found / (weight * seen.to(probs)).sum(2)).nan_to_num(0.0)
    if group is None:
        return found
    found = found.unflatten(1, (g, -1))
    return {"mean": found.mean, "sum": found.sum, "max": found.amax}[group](2)


def close(found, want):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("n", SIZES)
def test_sum_and_max_equal_the_full_matrix(n, groups, causal):
    q, k = 3 * rand(n, 2, 8, n, 16), rand(n + 1, 2, 8 // groups, n, 16)
    probs = truth(q, k, 0.25, causal=causal)
    close(attention_received(q, k, scaling=0.25, causal=causal), probs.sum(2))
    close(attention_received(q, k, scaling=0.25, causal=causal, reduce="max"), probs.amax(2))


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 65), (31, 65), (64, 257), (65, 66)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_last_rows_of_a_longer_context(n_q, n_k, causal):
    q, k = 3 * rand(0, 2, 4, n_q, 8), rand(1, 2, 2, n_k, 8)
    probs = truth(q, k, 0.35, causal=causal)
    close(attention_received(q, k, scaling=0.35, causal=causal), probs.sum(2))
    close(attention_received(q, k, scaling=0.35, causal=causal, reduce="max"), probs.amax(2))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (4, 1)]), st.integers(1, 40),
    st.integers(0, 20), st.integers(1, 50), st.booleans(),
    st.sampled_from(["none", "bool", "additive", "padding", "key"]),
)  # fmt: skip
def test_any_shape_mask_and_chunk(seed, b, heads, n_q, extra, chunk, causal, kind):
    (h, g), n_k = heads, n_q + extra
    q, k = 3 * rand(seed, b, h, n_q, 4), rand(seed + 1, b, g, n_k, 4)
    hide = torch.rand(b, 1, n_q, n_k, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask = {
        "none": None,
        "bool": ~hide,
        "additive": 5 * rand(seed + 2, b, h, n_q, n_k).masked_fill(hide, float("-inf")),
        "padding": ~hide[:, :, :1],  # [b, 1, 1, n_k]
        "key": rand(seed + 2, 1, 1, 1, n_k),
    }[kind]
    weight = rand(seed + 3, b, 1, n_q).abs()
    probs = truth(q, k, 0.5, mask, causal)
    options = {"scaling": 0.5, "mask": mask, "causal": causal, "chunk": chunk}
    close(attention_received(q, k, **options), probs.sum(2))
    close(attention_received(q, k, weight, **options), (probs * weight.double()[..., None]).sum(2))
    close(attention_received(q, k, weight, reduce="max", **options), (probs * weight.double()[..., None]).amax(2))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("group", [None, "mean", "sum", "max"])
@pytest.mark.parametrize("kind", ["none", "key", "rows", "least"])
def test_means_and_groups(kind, group, reduce):
    """Left-padded rows and keys; "least" hides by the most negative number, as transformers' eager masks do."""
    q, k, weight = 3 * rand(0, 2, 8, 33, 4), rand(1, 2, 2, 70, 4), rand(2, 2, 8, 33).abs()
    keys = torch.arange(70) >= torch.tensor([0, 20])[:, None, None, None]
    rows = keys & (torch.rand(2, 1, 33, 70, generator=torch.Generator().manual_seed(3)) < 0.6)
    mask = {"none": None, "key": keys, "rows": rows, "least": torch.zeros(rows.shape).masked_fill(~rows, -3.4028e38)}
    for causal in (False, True):
        options = {"scaling": 0.5, "mask": mask[kind], "causal": causal}
        seen, probs = seeing((2, 8, 33, 70), mask[kind], causal), truth(q, k, **options)
        for w in (None, weight):
            found = attention_received(q, k, w, reduce=reduce, group=group, **options)
            close(found, statistic(probs, w, reduce, group, 2, seen))


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_a_known_lse_is_enough_for_some_of_the_keys(kind):
    q, k = 3 * rand(0, 2, 4, 65, 8), rand(1, 2, 2, 65, 8)
    hide = torch.rand(2, 1, 65, 65, generator=torch.Generator().manual_seed(2)) < 0.3
    hide[:, :, 7] = True  # a row that sees nothing
    mask = {"none": None, "bool": ~hide, "additive": rand(3, *hide.shape).masked_fill(hide, float("-inf"))}[kind]
    lse, probs = attention_lse(q, k, scaling=0.35, mask=mask), truth(q, k, 0.35, mask)
    part = None if mask is None else mask[..., 20:40]
    close(attention_received(q, k[:, :, 20:40], scaling=0.35, mask=part, lse=lse), probs[..., 20:40].sum(2))
    maxima = attention_received(q, k[:, :, 20:40], scaling=0.35, mask=part, lse=lse, reduce="max")
    close(maxima, probs[..., 20:40].amax(2))


def test_a_nan_among_the_inputs_is_not_hidden():
    q, k = rand(0, 1, 2, 9, 4), rand(1, 1, 2, 9, 4)
    q[0, 1, 3] = float("nan")
    found = attention_received(q, k, scaling=0.5, causal=True)
    assert found[0, 0].isfinite().all() and found[0, 1, :4].isnan().all()


def test_without_weight_the_columns_sum_to_the_number_of_rows():
    q, k = rand(0, 2, 4, 100, 8), rand(1, 2, 4, 130, 8)
    found = attention_received(q, k, scaling=0.35)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 4), 100.0))


def test_rows_that_see_nothing_give_nothing_and_no_nan():
    q, k = rand(0, 2, 2, 70, 4), rand(1, 2, 2, 70, 4)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    mask[0, :, 10] = False
    mask[1] = False
    for given_mask in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        found = attention_received(q, k, scaling=0.5, mask=given_mask)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(-1), torch.tensor([[69.0, 69.0], [0.0, 0.0]]))
        close(attention_received(q, k, scaling=0.5, mask=given_mask, reduce="max"), truth(q, k, 0.5, mask).amax(2))


def test_strided_inputs_equal_contiguous_ones():
    q = rand(0, 2, 65, 4, 8).transpose(1, 2)  # as every transformers layer hands them over
    k = rand(1, 2, 65, 2, 16)[..., ::2].transpose(1, 2)
    mask = rand(2, 65, 1, 65, 2).permute(3, 1, 0, 2)
    assert not q.is_contiguous() and not k.is_contiguous() and not mask.is_contiguous()
    plain = attention_received(q.contiguous(), k.contiguous(), scaling=0.3, mask=mask.contiguous())
    torch.testing.assert_close(attention_received(q, k, scaling=0.3, mask=mask), plain, atol=1e-6, rtol=1e-6)


def test_inputs_are_left_alone():
    tensors = rand(0, 1, 2, 65, 4), rand(1, 1, 2, 65, 4), rand(2, 1, 1, 65), rand(3, 1, 1, 65, 65)
    copies = [t.clone() for t in tensors]
    attention_received(tensors[0], tensors[1], tensors[2], scaling=0.5, mask=tensors[3], causal=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("n", SIZES)
def test_low_precision_is_no_worse_than_twice_torchs_own_error(n, reduce, dtype):
    q, k = (3 * rand(n, 2, 4, n, 16)).to(dtype), rand(n + 1, 2, 2, n, 16).to(dtype)
    exact, low = truth(q, k, 0.25), truth(q, k, 0.25, dtype=dtype)
    exact, low = (exact.sum(2), low.sum(2)) if reduce == "sum" else (exact.amax(2), low.amax(2))
    ours = attention_received(q, k, scaling=0.25, reduce=reduce)
    assert ours.dtype == torch.float32
    error, allowed = (ours.double() - exact).abs().max(), (low.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)


@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_rows_equal_the_full_matrix(kind):
    q, k = 3 * rand(0, 2, 8, 33, 8), rand(1, 2, 2, 40, 8)
    seen = torch.rand(2, 1, 33, 40, generator=torch.Generator().manual_seed(2)) < 0.7
    mask = {None: None, "bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -1e4)}[kind]
    part = None if mask is None else mask[:, :, 5:7]
    close(attention_rows(q[:, :, 5:7], k, scaling=0.3, mask=part), truth(q, k, 0.3, mask)[:, :, 5:7])


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((2, 4, 8), (2, 4, 9, 8), {}, r"\(2, 4, 8\)"),
        ((2, 4, 9, 8), (1, 4, 9, 8), {}, r"batch.*\(2, 4, 9, 8\) and \(1, 4, 9, 8\)"),
        ((2, 4, 9, 8), (2, 4, 9, 6), {}, r"head dim.*\(2, 4, 9, 6\)"),
        ((2, 4, 9, 8), (2, 3, 9, 8), {}, r"multiple of key heads.*\(2, 3, 9, 8\)"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"mask": torch.zeros(2, 1, 9, 7)}, r"mask must be.* 9\]; got \(2, 1, 9, 7\)"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"mask": torch.zeros(2, 3, 9, 9)}, r"mask must be.*4\|1.*got \(2, 3, 9, 9\)"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"reduce": "median"}, r"reduce.*'sum', 'mean', 'max'; got 'median'"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"group": "min"}, r"group.*None, 'mean', 'sum', 'max'; got 'min'"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"lse": torch.zeros(2, 9)}, r"lse must be.*\[2, 4, 9\]; got \(2, 9\)"),
        ((2, 4, 9, 8), (2, 4, 9, 8), {"weight": torch.zeros(3, 9)}, r"weight.*\[2, 4, 9\]; got \(3, 9\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(q, k, options, message):
    with pytest.raises(ValueError, match=message):
        attention_received(torch.zeros(q), torch.zeros(k), scaling=1.0, **options)


def test_memory_grows_linearly():
    """The largest tensor alive is chunk x n, never n x n."""

    class Largest(torch.overrides.TorchFunctionMode):
        elements = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    sizes = {}
    for n in (256, 1024, 4096):
        Largest.elements = 0
        with Largest():
            attention_received(rand(0, 1, 1, n, 4), rand(1, 1, 1, n, 4), scaling=0.5, causal=True)
        sizes[n] = Largest.elements
    assert sizes[1024] == 4 * sizes[256] and sizes[4096] == 16 * sizes[256]
    assert sizes[4096] < 4096 * 4096 / 16


# (n_q, n_k), query heads a key head, causal, reduce, group, mask, weighted, known lse
KERNEL_CASES = [
    ((1, 1), 1, False, "sum", None, "none", False, False),
    ((1, 257), 8, True, "sum", "mean", "none", False, False),
    ((31, 31), 4, True, "max", "max", "none", True, False),
    ((31, 31), 1, False, "mean", None, "key", True, False),
    ((65, 65), 4, True, "sum", None, "none", True, True),
    ((65, 65), 8, False, "sum", "sum", "rows", False, False),
    ((64, 257), 4, True, "mean", "mean", "key", True, True),
    ((65, 31), 4, True, "mean", None, "none", False, False),
    ((257, 257), 4, True, "sum", "mean", "rows", True, False),
    ((257, 257), 8, False, "max", None, "additive", False, True),
    ((31, 65), 4, False, "sum", None, "key additive", False, False),
    ((65, 65), 4, True, "sum", "max", "nothing", False, False),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_is_no_worse_than_twice_torchs_own_error(case, dtype, device):
    (n_q, n_k), rep, causal, reduce, group, kind, weighted, known = case
    g, d = 8 // rep, 20  # a head dim that is no power of two
    q = rand_device(n_q, 1, n_q, 8, d, dtype=dtype).transpose(1, 2)  # strided, as a transformers layer hands it over
    k = rand_device(n_k, 1, g, n_k, 2 * d, dtype=dtype)[..., ::2]
    hide = (rand_device(2, 1, 1, n_q, n_k) < -0.5).index_fill(2, torch.tensor([0], device=device), True)
    keys = rand_device(3, 1, 1, 1, n_k, dtype=dtype)
    mask = {
        "none": None,
        "rows": ~hide,
        "nothing": torch.zeros_like(hide),
        "key": ~hide[:, :, -1:],
        "key additive": keys.masked_fill(keys > 1, torch.finfo(dtype).min),
        "additive": rand_device(4, 1, 8, n_q, n_k, dtype=dtype).masked_fill(hide, float("-inf")),
    }[kind]
    weight = rand_device(5, 1, 8, n_q).abs() if weighted else None
    seen = seeing((1, 8, n_q, n_k), mask, causal).to(device) if reduce == "mean" else None
    exact, low = (
        statistic(truth(q, k, 0.3, mask, causal, t), weight, reduce, group, g, seen) for t in (torch.float64, dtype)
    )
    with backend("triton"):
        lse = attention_lse(q, k, scaling=0.3, mask=mask, causal=causal) if known else None
        found = attention_received(
            q, k, weight, scaling=0.3, mask=mask, causal=causal, reduce=reduce, group=group, lse=lse
        )
    assert found.dtype == torch.float32
    three_way(found, low, exact)


@needs_triton
def test_kernel_equals_the_reference_to_fp32_rounding_and_repeats_bit_by_bit(device):
    q, k = 3 * rand_device(0, 2, 4, 257, 16), rand_device(1, 2, 2, 257, 16)
    options = {"scaling": 0.25, "causal": True, "group": "mean"}
    with backend("reference"):
        want = attention_received(q, k, **options)
    with backend("triton"):
        found, again = (attention_received(q, k, **options) for _ in range(2))
    assert torch.equal(found, again)
    torch.testing.assert_close(found, want, atol=5e-6, rtol=5e-6)
