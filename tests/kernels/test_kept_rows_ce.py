"""Cross-entropy whose backward pass goes through the kept rows alone."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from keeprate_kernels import head_gradient as gradient_module
from keeprate_kernels import token_stats as stats_function
from keeprate_kernels.kept_rows_ce import kept_rows_ce, kept_rows_ce_reference
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, needs_triton, rand, three_way


def case(t, v, c, dtype=torch.float32, keep=0.5):
    hidden, weight = rand(1, t, c, dtype=dtype), rand(2, v, c, dtype=dtype)
    bias = rand(3, v, dtype=dtype)
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    labels[::5] = -100
    token_weight = (rand(5, t).abs() + 0.1) * (torch.arange(t, device=DEVICE) % 10 < 10 * keep)
    return hidden, weight, labels, bias, token_weight


def plain(hidden, weight, labels, token_weight, *, bias=None, softcap=None, denominator=1.0):
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nll = F.cross_entropy(z, labels, reduction="none")
    return (token_weight.to(nll.dtype) * nll).sum() / denominator, nll.detach()


def run(function, hidden, weight, labels, token_weight, bias=None, **options):
    """Loss, nll, and gradients of hidden, weight and bias."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss, nll = function(inputs[0], inputs[1], labels, token_weight, bias=inputs[2], **options)
    assert loss.shape == () and not nll.requires_grad
    return [loss.detach(), nll, *torch.autograd.grad(loss, [x for x in inputs if x is not None])]


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("t", "v", "c"), [(1, 257, 31), (31, 65, 1), (257, 257, 65)])
def test_equals_the_plain_path(t, v, c, keep):
    """In float64 to rounding, in fp32 to 2e-6 of the largest gradient."""
    hidden, weight, labels, bias, w = case(t, v, c, torch.float64, keep)
    if t == 1:
        labels = labels.clamp(0)
    options = {"softcap": 4.0, "denominator": 7.0}
    truth = run(plain, hidden, weight, labels, w, bias, **options)
    for chunk in ((16, 50), None):
        found = run(kept_rows_ce_reference, hidden, weight, labels, w, bias, chunk=chunk, **options)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
    found = run(kept_rows_ce_reference, hidden.float(), weight.float(), labels, w, bias.float(), **options)
    for x, y in zip(found, truth, strict=True):
        assert (x - y).abs().max() <= 2e-6 * max(1.0, y.abs().max().item())


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "v", "c", "keep"), [(31, 65, 1, 0.5), (65, 257, 65, 0.3), (40, 129, 64, 1.0)])
def test_three_way(dtype, t, v, c, keep):
    hidden, weight, labels, bias, w = case(t, v, c, dtype, keep)
    options = {"softcap": 5.0, "denominator": w.sum()}
    truth = run(plain, hidden.double(), weight.double(), labels, w.double(), bias.double(), **options)
    low = run(plain, hidden, weight, labels, w, bias, **options)
    with backend("triton"):
        found = run(kept_rows_ce, hidden, weight, labels, w, bias, chunk=(20, 100), **options)
    three_way(found, low, truth, tiny=2e-6)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("denominator", [None, 0, 3.0, "sum"])
def test_nothing_kept(name, denominator):
    """Zero loss and zero gradients, no NaN, also where the denominator is 0 because nothing is kept."""
    hidden, weight, labels, bias, w = case(31, 65, 8)
    empty = torch.zeros_like(w)
    denominator = empty.sum() if denominator == "sum" else denominator
    for kept in (empty, empty.bool()):
        for score_rest in (True, False):
            with backend(name):
                loss, _, *grads = run(
                    kept_rows_ce, hidden, weight, labels, kept, bias, denominator=denominator, score_rest=score_rest
                )
            assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    with backend(name):
        loss, nll, *grads = run(kept_rows_ce, hidden, weight, torch.full_like(labels, -100), w, bias, denominator=0)
    assert loss == 0 and (nll == 0).all() and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_the_backward_pass_sees_the_kept_rows_alone(name, monkeypatch):
    """Counted, and shown: what the rest held when the backward pass ran is of no consequence."""
    hidden, weight, labels, _, w = case(40, 65, 8, keep=0.3)
    kept = (w != 0) & (labels != -100)
    rows = []
    for function in ("_dlogits_torch", "_dlogits_triton"):
        original = getattr(gradient_module, function)

        def counted(tile, hidden, *rest, original=original):
            rows.append(len(hidden))
            return original(tile, hidden, *rest)

        monkeypatch.setattr(gradient_module, function, counted)
    with backend(name):
        *_, grad, _ = run(kept_rows_ce, hidden, weight, labels, w, chunk=(1000, 1000))
    assert rows == [int(kept.sum())]
    assert torch.equal(grad.abs().sum(1) != 0, kept)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *(x.numel() for x in found)])
        return out


def test_logits_are_never_in_memory_as_a_whole():
    """600 tokens x 1500 entries are 900,000 logits; the largest tensor is a tile of 256 x 512 or a gradient."""
    hidden, weight, labels, bias, w = case(600, 1500, 16)
    with backend("reference"):
        with Largest() as ours:
            run(kept_rows_ce, hidden, weight, labels, w, bias, softcap=5.0)
            stats_function(hidden, weight, labels, bias=bias)
        with Largest() as theirs:
            run(plain, hidden, weight, labels, w, bias, softcap=5.0)
    assert theirs.entries == 600 * 1500
    # the two tiles of the statistics are one allocation; a GPU without triton takes larger tiles
    assert ours.entries == 2 * 256 * 512 or DEVICE.type == "cuda"


def test_scores_may_be_known_or_left_out():
    hidden, weight, labels, bias, w = case(40, 65, 8, keep=0.3)
    want = run(kept_rows_ce, hidden, weight, labels, w, bias, softcap=9.0)
    with torch.no_grad():
        stats = stats_function(hidden, weight, labels, bias=bias, softcap=9.0)
    torch.testing.assert_close(run(kept_rows_ce, hidden, weight, labels, w, bias, softcap=9.0, stats=stats), want)
    loss, nll, *grads = run(kept_rows_ce, hidden, weight, labels, w, bias, softcap=9.0, score_rest=False)
    torch.testing.assert_close((loss, *grads), (want[0], *want[2:]))
    torch.testing.assert_close(nll, torch.where(w != 0, want[1], 0))


def test_masks_batches_and_denominators():
    hidden, weight, labels, _, w = case(40, 65, 8, keep=0.3)
    mask = w != 0
    loss, nll = kept_rows_ce(hidden, weight, labels, mask)
    torch.testing.assert_close(loss, nll[mask].sum())
    batched, shaped = kept_rows_ce(hidden.view(4, 10, 8), weight, labels.view(4, 10), mask.view(4, 10), denominator=4)
    assert shaped.shape == (4, 10)
    torch.testing.assert_close(batched, loss / 4)
    mean = kept_rows_ce(hidden, weight, labels, labels != -100, denominator=(labels != -100).sum())[0]
    torch.testing.assert_close(mean, F.cross_entropy(hidden @ weight.T, labels))
    # the sum of the weights as denominator: their scale does not matter
    one, many = (kept_rows_ce(hidden, weight, labels, s * w, denominator=(s * w).sum())[0] for s in (1, 50))
    torch.testing.assert_close(one, many)


def test_weights_may_learn():
    hidden, weight, labels, _, w = case(12, 40, 8, keep=1.0)
    w.requires_grad_()
    loss, nll = kept_rows_ce(hidden, weight, labels, w, denominator=5.0)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], nll / 5)


def test_bad_input_is_named():
    hidden, weight, labels, _, w = case(12, 40, 8)
    stats = stats_function(hidden[:5], weight, labels[:5])
    wrong = {
        r"token_weight must be \(12,\).*\(11,\)": lambda: kept_rows_ce(hidden, weight, labels, w[:11]),
        "token_weight must be real": lambda: kept_rows_ce(hidden, weight, labels, w.to(torch.complex64)),
        "denominator must be at least 0; got -1": lambda: kept_rows_ce(hidden, weight, labels, w, denominator=-1),
        "denominator is 0, but . tokens": lambda: kept_rows_ce(hidden, weight, labels, w, denominator=0),
        r"denominator must be .*\(2,\)": lambda: kept_rows_ce(hidden, weight, labels, w, denominator=w[:2]),
        r"stats must be of \(12,\) tokens.*\(5,\)": lambda: kept_rows_ce(hidden, weight, labels, w, stats=stats),
        r"labels must be \(12,\)": lambda: kept_rows_ce(hidden, weight, labels[:3], w),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
