"""attention_lse: row log-sum-exp against float64, for reference and kernel, with every kind of mask."""

import pytest
import torch

from keeprate_kernels import attention_lse
from keeprate_kernels.runtime import backend

from .checks import DTYPES, SIZES, needs_triton, rand, three_way


def naive(q, k, scaling, mask=None, causal=False, dtype=torch.float64) -> torch.Tensor:
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(dtype)
    if causal:
        n_q, n_k = logits.shape[-2:]
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.logsumexp(-1)


def case(n_q, n_k, rep, kind, dtype=torch.float32):
    q, k = 3 * rand(n_q, 2, 8, n_q, 16, dtype=dtype), rand(n_k + 1, 2, 8 // rep, n_k, 16, dtype=dtype)
    hide = rand(2, 2, 1, n_q, n_k) < 0
    hide[:, :, 0] = True  # a row that sees nothing
    mask = {
        "none": None,
        "bool": ~hide,
        "additive": rand(3, 2, 8, n_q, n_k, dtype=dtype).masked_fill(hide, float("-inf")),
        "key": ~hide[:, :, -1:],
    }[kind]
    return q, k, mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "key"])
@pytest.mark.parametrize("rep", [1, 4, 8])
@pytest.mark.parametrize("n", SIZES)
def test_reference_equals_float64(n, rep, kind, causal):
    for n_q in {n, 1, n + 5}:  # as many rows as keys, one row of a longer context, rows before the first key
        q, k, mask = case(n_q, n, rep, kind)
        with backend("reference"):
            found = attention_lse(q, k, scaling=0.25, mask=mask, causal=causal, chunk=17)
        assert found.shape == q.shape[:3] and found.dtype == torch.float32
        want = naive(q, k, 0.25, mask, causal)
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_q", "n_k", "rep", "kind", "causal"),
    [
        (1, 1, 1, "none", True),
        (1, 257, 8, "key", False),  # the keys are split over programs
        (31, 65, 4, "bool", True),
        (65, 31, 4, "none", True),
        (65, 257, 1, "additive", False),
        (257, 257, 4, "none", True),
    ],
)
def test_kernel_is_no_worse_than_twice_torchs_own_error(n_q, n_k, rep, kind, causal, dtype):
    q, k, mask = (None if t is None else t[:1] for t in case(n_q, n_k, rep, kind, dtype))
    exact, low = (naive(q, k, 0.25, mask, causal, t) for t in (torch.float64, dtype))
    with backend("triton"):
        found = attention_lse(q, k, scaling=0.25, mask=mask, causal=causal)
    three_way(found, low, exact)


def test_no_rows_and_large_logits():
    q, k = rand(0, 1, 2, 0, 8), rand(1, 1, 2, 5, 8)
    assert attention_lse(q, k, scaling=1.0).shape == (1, 2, 0)
    q = torch.full((1, 1, 3, 4), 100.0)
    torch.testing.assert_close(
        attention_lse(q, q, scaling=1.0), torch.full((1, 1, 3), 40000.0 + torch.tensor(3.0).log())
    )


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"batch.*\(1, 2, 3, 4\) and \(2, 2, 3, 4\)"):
        attention_lse(torch.zeros(1, 2, 3, 4), torch.zeros(2, 2, 3, 4), scaling=1.0)
