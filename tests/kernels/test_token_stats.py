"""Statistics of tokens from hidden states and the head, against plain logits."""

import pytest
import torch
from torch.nn import functional as F

from keeprate_kernels.runtime import backend
from keeprate_kernels.token_stats import STATS, TokenStats, token_stats, token_stats_reference

from .checks import DEVICE, DTYPES, needs_triton, rand, three_way

NAMES = ("nll", "entropy", "mean", "variance", "lse")


def plain(hidden, weight, labels, bias=None, softcap=None):
    """(nll, entropy, mean, variance, lse) as one writes them, with every logit in memory."""
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]) ** 2).sum(-1)
    nll = F.cross_entropy(z, labels, reduction="none", ignore_index=-100)
    valid = labels != -100
    # an ignored row has statistics, but they have no gradient
    rest = (torch.where(valid, x, x.detach()) for x in (-mean, mean, variance, z.logsumexp(-1)))
    return nll, *rest


def case(t, v, c, dtype=torch.float32, ignored=True, scale=1.0):
    hidden = rand(1, t, c, dtype=dtype) * scale
    weight, bias = rand(2, v, c, dtype=dtype), rand(3, v, dtype=dtype)
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    if ignored:
        labels[::5] = -100
    return hidden, weight, labels, bias


def gradients(statistics, inputs, seed=9):
    """Gradients of a random mixture of statistics."""
    inputs = [x for x in inputs if x is not None]
    loss = sum((x * rand(seed + i, *x.shape, dtype=x.dtype)).sum() for i, x in enumerate(statistics))
    return torch.autograd.grad(loss, inputs)


def run(function, hidden, weight, labels, bias, **options):
    """Statistics and gradients of hidden, weight (and bias), all of them detached from each other."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    hidden, weight, bias = inputs
    found = function(hidden, weight, labels, bias=bias, **options)[:5]
    return [x.detach() for x in found], gradients(found, inputs)


@pytest.mark.parametrize(("t", "v", "c"), [(1, 1, 1), (1, 257, 31), (31, 65, 1), (65, 31, 65), (257, 257, 31)])
@pytest.mark.parametrize("extras", [False, True])
def test_statistics_and_gradients_are_those_of_plain_logits_in_float64(t, v, c, extras):
    hidden, weight, labels, bias = case(t, v, c, torch.float64, ignored=t > 1)
    options = {"softcap": 3.0} if extras else {}
    bias = bias if extras else None
    truth, exact = run(plain, hidden, weight, labels, bias, **options)
    for chunk in ((16, 50), (7, 40), (1000, 1000), None):
        found, grads = run(token_stats_reference, hidden, weight, labels, bias, chunk=chunk, **options)
        torch.testing.assert_close((*found, *grads), (*truth, *exact), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Against finite differences, each statistic alone."""
    hidden, weight, labels, bias = (x.double() if x.is_floating_point() else x for x in case(5, 11, 3))

    def one(hidden, weight, bias):
        with backend("reference"):
            found = token_stats(hidden, weight, labels, bias=bias, softcap=4.0, chunk=(2, 4))
        return torch.where(labels == -100, 0, getattr(found, name))

    torch.autograd.gradcheck(one, [x.requires_grad_() for x in (hidden, weight, bias)])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "v", "c", "extras"), [(1, 257, 31, False), (31, 65, 1, True), (65, 257, 65, True), (65, 300, 64, False)]
)
def test_three_way(dtype, t, v, c, extras):
    hidden, weight, labels, bias = case(t, v, c, dtype, ignored=t > 1, scale=0.5)
    bias, options = (bias, {"softcap": 5.0}) if extras else (None, {})
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    truth, exact = run(plain, wide[0], wide[1], labels, wide[2], **options)
    low, rough = run(plain, hidden, weight, labels, bias, **options)
    with backend("triton"):
        found, grads = run(token_stats, hidden, weight, labels, bias, chunk=(40, 200), **options)
    assert all(x.dtype == torch.float32 for x in found) and all(g.dtype == dtype for g in grads)
    three_way(found, low, truth, tiny=2e-6)
    three_way(grads, rough, exact, tiny=2e-6)
    # and the reference, held to the same bar
    found, grads = run(token_stats_reference, hidden, weight, labels, bias, **options)
    three_way(found, low, truth, tiny=2e-6)
    three_way(grads, rough, exact, tiny=2e-6)


@needs_triton
def test_non_contiguous_inputs_and_nothing_read_beside_them():
    hidden, weight, labels, bias = case(33, 70, 17)
    want, grads = run(token_stats_reference, hidden, weight, labels, bias)
    strided = torch.full((33, 2, 17), torch.nan, device=DEVICE)
    strided[:, 0] = hidden
    turned = torch.full((18, 71), torch.nan, device=DEVICE).T
    turned[:70, :17] = weight
    spaced = torch.full((70, 2), torch.nan, device=DEVICE)
    spaced[:, 1] = bias
    beside = torch.stack((labels, labels + 1_000_000), 1)[:, 0]
    for name in ("reference", "triton"):
        with backend(name):
            found, others = run(token_stats, strided[:, 0], turned[:70, :17], beside, spaced[:, 1])
        torch.testing.assert_close((*found, *others), (*want, *grads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_far_apart_logits_overflow_nothing(name):
    """One entry holds all the mass, then every entry the same; shifted by 1000 as well."""
    hidden = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE)
    weight = torch.linspace(-1000, 1000, 200, device=DEVICE)[:, None]
    bias = torch.full((200,), 1000.0, device=DEVICE)
    labels = torch.tensor([199, 7, 199], device=DEVICE)
    with backend(name):
        found = token_stats(hidden, weight, labels, bias=bias, chunk=(2, 64))
    truth = plain(hidden.double(), weight.double(), labels, bias.double())
    for x, y in zip(found, truth, strict=False):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-3)  # fp32 at 2000 has steps of 1.2e-4
    assert found.correct.tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nearly_flat_distributions_keep_their_variance(name):
    """Logits of 30 plus 1e-3: sum p logp^2 - mean^2 would cancel to nothing in fp32."""
    hidden = torch.cat((torch.full((4, 1), 30.0), rand(5, 4, 8).cpu() * 1e-3), 1).to(DEVICE)
    weight = torch.cat((torch.ones(300, 1), rand(6, 300, 8).cpu()), 1).to(DEVICE)
    labels = torch.arange(4, device=DEVICE)
    with backend(name):
        found = token_stats(hidden, weight, labels).variance
    truth = plain(hidden.double(), weight.double(), labels)[3]
    torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol=0)  # logits at 30 have steps of 2e-6


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_correct_is_the_argmax(name):
    hidden, weight, labels, _ = case(40, 90, 8)
    best = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.arange(40, device=DEVICE) % 3 == 0, best, labels)
    labels[0] = -100
    with backend(name):
        found = token_stats(hidden, weight, labels, stats=("nll",), chunk=(16, 32))
    assert torch.equal(found.correct, (labels == best) & (labels != -100)) and found.correct.sum() >= 13
    assert found.entropy is None and found.mean is None and found.variance is None
    prob = (hidden @ weight.T).softmax(-1).gather(1, labels[:, None].clamp(0))[:, 0]
    torch.testing.assert_close(found.prob, torch.where(labels == -100, 1, prob))


def test_batches_ignored_rows_and_names():
    hidden, weight, labels, _ = case(24, 50, 8)
    flat = token_stats(hidden, weight, labels)
    found = token_stats(hidden.view(4, 6, 8), weight, labels.view(4, 6))
    for x, y in zip(found, flat, strict=True):
        assert x.shape == (4, 6) and torch.equal(x.flatten(), y)
    assert isinstance(flat, TokenStats) and torch.equal(flat.entropy, -flat.mean)
    assert (flat.nll[labels == -100] == 0).all() and (flat.prob[labels == -100] == 1).all()
    other = token_stats(hidden, weight, torch.where(labels == -100, 1, labels), ignore_index=1)
    assert (other.nll[labels == -100] == 0).all()
    only = token_stats(hidden, weight, labels, stats="entropy")
    assert torch.equal(only.entropy, flat.entropy) and only.mean is None and only.variance is None
    none = token_stats(hidden[:0], weight, labels[:0])
    assert all(x.shape == (0,) for x in none)


def test_frozen_parts_and_inference():
    """A frozen head (adapters) asks for no gradient of its size; without a graph nothing is kept."""
    hidden, weight, labels, _ = case(12, 40, 8)
    hidden.requires_grad_()
    token_stats(hidden, weight, labels).nll.sum().backward()
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), hidden)[0]
    torch.testing.assert_close(hidden.grad, exact)
    assert weight.grad is None
    with torch.no_grad():
        assert not token_stats(hidden, weight, labels).nll.requires_grad
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(token_stats(hidden, weight, labels).entropy.sum(), hidden, create_graph=True)


def test_what_is_known_is_not_scored_again_and_gets_its_gradient():
    hidden, weight, labels, _ = (x.requires_grad_() if x.is_floating_point() else x for x in case(24, 50, 8))
    fresh = token_stats(hidden, weight, labels, stats=("nll",), softcap=7.0)
    want = torch.autograd.grad((fresh.nll * torch.arange(24, device=DEVICE)).sum(), (hidden, weight))
    known = token_stats(hidden.detach(), weight.detach(), labels, stats=("nll",), softcap=7.0)
    doubled = known._replace(nll=known.nll * 2)
    for given in (known, doubled):
        again = token_stats(hidden, weight, labels, stats=("nll",), softcap=7.0, known=given)
        assert torch.equal(again.nll, given.nll) and torch.equal(again.lse, given.lse)
        found = torch.autograd.grad((again.nll * torch.arange(24, device=DEVICE)).sum(), (hidden, weight))
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y)


def test_autocast_casts_as_linear_does():
    hidden, weight, labels, _ = case(12, 40, 8)
    hidden.requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16), backend("reference"):
        found = token_stats(hidden, weight, labels)
        found.nll.sum().backward()
    rounded = token_stats_reference(hidden.detach().bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(found.nll, rounded.nll) and hidden.grad.dtype == torch.float32 and hidden.grad.abs().sum() > 0


def test_bad_input_is_named():
    hidden, weight, labels, bias = case(12, 40, 8)
    wrong = {
        r"\(12, 8\) and \(40, 7\)": lambda: token_stats(hidden, weight[:, :7], labels),
        r"labels must be \(12,\).*\(11,\)": lambda: token_stats(hidden, weight, labels[:11]),
        "labels must be integers; got torch.float32": lambda: token_stats(hidden, weight, labels.float()),
        r"bias must be \[40\].*\(39,\)": lambda: token_stats(hidden, weight, labels, bias=bias[:39]),
        "softcap must be positive.*-1": lambda: token_stats(hidden, weight, labels, softcap=-1.0),
        r"chunk must be .*\(0, 3\)": lambda: token_stats(hidden, weight, labels, chunk=(0, 3)),
        "torch.float32, torch.float64": lambda: token_stats(hidden, weight.double(), labels),
        r"labels must lie in \[0, 40\).*got 40": lambda: token_stats(hidden, weight, torch.full_like(labels, 40)),
        "got -1": lambda: token_stats(hidden, weight, torch.full_like(labels, -1)),
        "stats must name some of nll.*'rank'": lambda: token_stats(hidden, weight, labels, stats=("rank",)),
        r"stats must name .*\(\)": lambda: token_stats(hidden, weight, labels, stats=()),
        r"known must be of \(12,\).*\(11,\)": lambda: token_stats(
            hidden, weight, labels, stats="nll", known=token_stats(hidden[:11], weight, labels[:11])
        ),
        r"known must be .*'entropy'": lambda: token_stats(
            hidden, weight, labels, stats="entropy", known=token_stats(hidden, weight, labels)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert set(STATS) == {"nll", "entropy", "mean", "variance"}


@needs_triton
def test_the_same_bits_every_time():
    hidden, weight, labels, bias = case(65, 300, 16)
    with backend("triton"):
        first, second = (run(token_stats, hidden, weight, labels, bias) for _ in range(2))
    for x, y in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(x, y)
