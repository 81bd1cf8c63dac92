"""bipartite_match against the whole matrix in float64: values three ways, positions exactly, ties, padding, strides."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import bipartite_match
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, SIZES, needs_triton, rand, three_way

module = importlib.import_module("keeprate_kernels.bipartite_match")  # the package's attribute is the function
BACKENDS = [pytest.param("triton", marks=needs_triton), "reference"]


def matrix(metric, source, destination, valid=None, dtype=torch.float64):
    """[b, s, t] cosines written out; what is not valid is -inf."""
    b = len(metric)
    unit = torch.nn.functional.normalize(metric.to(dtype), dim=-1)
    row = torch.arange(b, device=metric.device)[:, None]
    source, destination = source.expand(b, -1), destination.expand(b, -1)
    cosine = unit[row, source] @ unit[row, destination].mT
    if valid is None:
        return cosine
    pair = valid[row, source][:, :, None] & valid[row, destination][:, None, :]
    return cosine.masked_fill(~pair, float("-inf"))


def check(metric, source, destination, valid=None):
    """Values three ways; every position reaches the value that it is said to have."""
    best, position = bipartite_match(metric, source, destination, valid)
    exact = matrix(metric, source, destination, valid)
    assert best.dtype == torch.float32 and position.dtype == torch.int64
    assert position.min() >= 0 and position.max() < destination.shape[-1]
    low = matrix(metric, source, destination, valid, metric.dtype).amax(-1)
    three_way(best, low, exact.amax(-1))
    reached = exact.gather(-1, position[..., None]).squeeze(-1)
    assert torch.equal(reached.isinf(), exact.amax(-1).isinf())
    finite = reached.isfinite()
    assert ((exact.amax(-1) - reached)[finite] <= 1e-6).all(), "another destination is nearer"
    assert (position[~finite] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c"), [(2, 1), (31, 20), (65, 64), (257, 33)])
def test_the_best_destination_is_found(n, c, dtype, name):
    metric, index = rand(n, 2, n, c, dtype=dtype), torch.arange(n, device=DEVICE)
    with backend(name):
        check(metric, index[::2], index[1::2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("s", "t"), [(1, 65), (65, 1), (31, 257), (257, 31)])
def test_lists_of_any_length_and_of_every_sample(s, t, name):
    metric = rand(0, 3, s + t, 24)
    order = torch.stack([torch.randperm(s + t, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    order = order.to(DEVICE)
    with backend(name):
        check(metric, order[:, :s], order[:, s:])
        check(metric, order[0, :s].int(), order[:1, s:])


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_is_never_chosen_and_finds_nobody(name):
    metric = rand(1, 4, 129, 16)
    metric[:, 100:] *= 1000  # would win if it were looked at
    valid = torch.arange(129, device=DEVICE) < torch.tensor([[129], [70], [3], [0]], device=DEVICE)
    valid[2] = False
    valid[2, 4] = True  # one source and no destination
    source, destination = torch.arange(0, 129, 2, device=DEVICE), torch.arange(1, 129, 2, device=DEVICE)
    with backend(name):
        check(metric, source, destination, valid)
        best, position = bipartite_match(metric, source, destination, valid)
        dirty = metric.masked_fill(~valid[..., None], float("nan"))
        again = bipartite_match(dirty, source, destination, valid)
        alone = bipartite_match(metric[1:2, :70], source[:35], destination[:35])
    assert torch.equal(best, again[0]) and torch.equal(position, again[1])
    torch.testing.assert_close(best[1:2, :35], alone[0])
    assert torch.equal(position[1:2, :35], alone[1])
    assert best[2:].isneginf().all() and not position[2:].any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("t", [5, 300])
def test_ties_go_to_the_lower_position(t, name):
    # rows of +-1 with four channels: norms are 2 and cosines multiples of 1/2, both without rounding
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], device=DEVICE)
    draw = torch.randint(0, 4, (2, t + 40), generator=torch.Generator().manual_seed(t)).to(DEVICE)
    metric = torch.nn.functional.pad(signs[draw], (0, 12))
    source, destination = torch.arange(t, t + 40, device=DEVICE), torch.arange(t, device=DEVICE)
    exact = matrix(metric, source, destination)
    first = (exact == exact.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    with backend(name):
        best, position = bipartite_match(metric, source, destination)
    assert torch.equal(position, first) and torch.equal(best.double(), exact.amax(-1))


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_scale_and_zero_vectors_do_not_matter(name):
    wide = rand(2, 66, 2, 40)
    metric = wide.transpose(0, 1)[:, 1:, ::2]  # [2, 65, 20], no axis contiguous
    source, destination = torch.arange(65, device=DEVICE)[::2], torch.arange(65, device=DEVICE)[1::2]
    assert not metric.is_contiguous() and not source.is_contiguous()
    before = metric.clone()
    with backend(name):
        check(metric, source, destination)
        plain = bipartite_match(metric.contiguous(), source.contiguous(), destination.contiguous())
        strided = bipartite_match(metric, source, destination)
        torch.testing.assert_close(strided, plain, rtol=0, atol=3e-7)  # positions equal: they are integers
        assert torch.equal(metric, before)
        scale = 2.0 ** torch.randint(-20, 20, (2, 65, 1), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        scaled = bipartite_match(metric * scale, source, destination)
        torch.testing.assert_close(scaled, plain, rtol=0, atol=3e-7)
        metric = metric.clone()
        metric[:, 0] = metric[0, 1::2] = 0
        best, position = bipartite_match(metric, source, destination)
    assert not best[:, 0].any() and not best[0].any() and not position[0].any()  # all equally similar: the first


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 150), st.integers(1, 200), st.booleans(),
    st.sampled_from([1, 1 << 10, 1 << 30]),
)  # fmt: skip
def test_the_reference_in_any_chunks(seed, b, s, t, padded, chunk):
    metric = rand(seed, b, s + t, 5)
    order = torch.randperm(s + t, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    valid = (rand(seed + 1, b, s + t) > 0) if padded else None
    with pytest.MonkeyPatch.context() as patch, backend("reference"):
        patch.setattr(module, "WHOLE", 0)
        patch.setattr(module, "CHUNK", chunk)
        check(metric, order[:s], order[s:], valid)


@needs_triton
@pytest.mark.parametrize("n", SIZES[1:])
def test_kernel_and_reference_agree(n):
    metric, index = rand(n, 2, n, 16), torch.arange(n, device=DEVICE)
    found = {}
    for name in ("triton", "reference"):
        with backend(name):
            found[name] = bipartite_match(metric, index[::2], index[1::2])
    torch.testing.assert_close(found["triton"][0], found["reference"][0], rtol=0, atol=3e-7)
    assert torch.equal(found["triton"][1], found["reference"][1])


def test_the_matrix_is_never_held():
    class Largest(torch.overrides.TorchFunctionMode):
        elements = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    index = torch.arange(6000, device=DEVICE)
    metric = rand(0, 1, 6000, 4)
    with Largest():
        bipartite_match(metric, index[::2], index[1::2])
    assert Largest.elements <= module.CHUNK < 3000 * 3000 / 16


def test_no_gradient_is_recorded():
    metric = rand(0, 1, 300, 4).requires_grad_()
    index = torch.arange(300, device=DEVICE)
    assert not bipartite_match(metric, index[::2], index[1::2])[0].requires_grad


@pytest.mark.parametrize(
    ("metric", "source", "destination", "valid", "message"),
    [
        ((4, 8), (2,), (2,), None, r"metric.*\(4, 8\)"),
        ((1, 0, 8), (2,), (2,), None, r"metric.*\(1, 0, 8\)"),
        ((2, 4, 8), (3, 2), (2,), None, r"source must be \[m\] or \[2, m\].*\(3, 2\)"),
        ((2, 4, 8), (2,), (0,), None, r"destination.*got \(0,\)"),
        ((2, 4, 8), (2,), (2,), (2, 5), r"valid must be boolean \(2, 4\); got torch.bool \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(metric, source, destination, valid, message):
    index = [torch.zeros(shape, dtype=torch.long) for shape in (source, destination)]
    with pytest.raises(ValueError, match=message):
        bipartite_match(torch.zeros(metric), *index, None if valid is None else torch.ones(valid, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"source must hold int32 or int64 positions; got torch.float32"):
        bipartite_match(torch.zeros(1, 4, 2), torch.zeros(2), torch.zeros(2, dtype=torch.long))
