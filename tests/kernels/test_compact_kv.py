"""compact_kv moves exactly the chosen rows: dense, ragged, in place, through any strides; what it cannot do it says."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import compact_kv
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, SIZES, needs_triton, rand

module = importlib.import_module("keeprate_kernels.compact_kv")  # the package's attribute is the function
FLAT = torch.zeros(3, dtype=torch.long)
BACKENDS = [pytest.param("triton", marks=needs_triton), "reference"]


def draw_sorted(seed, b, g, k, n):
    """k different positions of every head, rising."""
    order = torch.rand(b, g, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[..., :k].sort(-1).values.to(DEVICE)


def picked(x, index):
    """x [b, g, n, d] at index, by torch.gather: bits, so nothing to tolerate."""
    index = index.long().expand(*x.shape[:2], -1)
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (31, 31, 33), (65, 1, 8), (257, 129, 64), (600, 500, 20)])
def test_dense(n, k, d, dtype, in_place, name):
    key, value = rand(0, 2, 3, n, d, dtype=dtype), rand(1, 2, 3, n, d, dtype=dtype)
    index = draw_sorted(n, 2, 3, k, n)
    expected = picked(key, index), picked(value, index)
    behind = key[:, :, k:].clone()
    with backend(name):
        found = compact_kv(key, value, index, in_place=in_place)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[0].data_ptr() == key.data_ptr()) == in_place
    assert torch.equal(key[:, :, k:], behind)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("k", [0, 1, 40, 100])
def test_strides_heads_in_common_and_short_positions(k, in_place, name):
    buffer = rand(0, 2, 140, 3, 24)
    spare = buffer.clone()
    key, value = buffer.transpose(1, 2)[:, :, 20:120], rand(1, 2, 3, 24, 100).mT
    assert not key.is_contiguous() and value.stride(3) != 1
    index = draw_sorted(k, 1, 1, k, 100).expand(2, 1, -1).int()
    expected = picked(key, index), picked(value, index)
    with backend(name):
        found = compact_kv(key, value, index, in_place=in_place)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(buffer[:, :20], spare[:, :20]) and torch.equal(buffer[:, 20 + k :], spare[:, 20 + k :])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_copy_takes_any_order_and_repeats(name):
    key, value = rand(0, 2, 2, 50, 16), rand(1, 2, 2, 50, 16)
    index = torch.randint(50, (2, 70, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE).mT
    with backend(name):
        found = compact_kv(key, value, index, check=True)
    assert torch.equal(found[0], picked(key, index)) and torch.equal(found[1], picked(value, index))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("counts", [
    [[1, 31], [65, 257]], [[0, 300], [0, 0]], [[300, 300], [300, 300]], [[0, 0], [0, 0]], [[5, 0], [0, 299]],
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(counts, dtype, name):
    counts = torch.tensor(counts, device=DEVICE)
    key, value = rand(0, 2, 2, 320, 24, dtype=dtype)[:, :, :300], rand(1, 2, 300, 2, 24, dtype=dtype).transpose(1, 2)
    heads = [draw_sorted(i, 1, 1, k, 300)[0, 0] for i, k in enumerate(counts.flatten().tolist())]
    expected = [torch.cat([x.flatten(0, 1)[i, at] for i, at in enumerate(heads)]) for x in (key, value)]
    with backend(name):
        found = compact_kv(key, value, torch.cat(heads), counts=counts)
        narrow = compact_kv(key, value, torch.cat(heads).int(), counts=counts.int())
    for keys, values in (found, narrow):
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_in_place_over_several_blocks(name, data):
    n = data.draw(st.integers(1, 700), "n")
    seed, k = data.draw(st.integers(0, 2**31 - 1), "seed"), data.draw(st.integers(1, n), "k")
    key, value = rand(seed, 1, 1, n, 3), rand(seed + 1, 1, 1, n, 3)
    index = draw_sorted(seed, 1, 1, k, n)
    expected = picked(key, index), picked(value, index)
    with backend(name):
        found = compact_kv(key, value, index, in_place=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@needs_triton
def test_positions_out_of_range_stay_inside_the_tensors_when_unchecked():
    key, value = rand(0, 1, 2, 31, 8), rand(1, 1, 2, 31, 8)
    index = torch.tensor([[[-1, 3, 31], [0, 10**12, 30]]], device=DEVICE)
    good = (index >= 0) & (index < 31)
    with backend("triton"):
        keys, values = compact_kv(key, value, index, check=False)
    safe = index.where(good, 0)
    assert torch.equal(keys[good], picked(key, safe)[good]) and torch.equal(values[good], picked(value, safe)[good])


def test_gradients_flow_through_the_reference():
    key, value = (rand(i, 1, 2, 9, 3).requires_grad_() for i in (0, 1))
    index = draw_sorted(0, 1, 2, 4, 9)
    (compact_kv(key, value, index)[0].sum() * 2).backward()
    assert torch.equal(key.grad, torch.zeros_like(key).scatter_(2, index[..., None].expand(-1, -1, -1, 3), 2.0))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("index", "in_place", "message"), [
    ([[0, 5], [1, 31]], False, r"positions in 0\.\.30; got 0\.\.31"),
    ([[0, 5], [-1, 3]], True, r"positions in 0\.\.30; got -1\.\.5"),
    ([[0, 5], [4, 3]], True, "positions that increase"),
    ([[0, 5], [4, 4]], True, "positions that increase"),
])  # fmt: skip
def test_positions_are_checked(index, in_place, message, name):
    x = torch.zeros(1, 2, 31, 4, device=DEVICE)
    with backend(name), pytest.raises(ValueError, match=message):
        compact_kv(x, x.clone(), torch.tensor([index], device=DEVICE), in_place=in_place, check=True)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"key": torch.zeros(2, 31, 4)}, r"key and value.*\(2, 31, 4\)"),
    ({"value": torch.zeros(1, 2, 30, 4)}, r"key and value.*\(1, 2, 30, 4\)"),
    ({"value": torch.zeros(1, 2, 31, 4, dtype=torch.float16)}, "one dtype; got torch.float32 and torch.float16"),
    ({"index": torch.zeros(1, 3, 4, dtype=torch.long)}, r"index must be \[1, 2 or 1, k\]; got \(1, 3, 4\)"),
    ({"index": torch.zeros(1, 2, 4)}, "int32 or int64 positions; got torch.float32"),
    ({"counts": torch.ones(1, 2, dtype=torch.long)}, r"index must be flat.*\(1, 2, 1\)"),
    ({"index": FLAT[:3], "counts": torch.ones(1, 2, dtype=torch.long)}, "sum to the 3 positions.*got 2"),
    ({"index": FLAT[:2], "counts": torch.tensor([[3, -1]])}, "counts must sum"),
    ({"index": FLAT[:2], "counts": torch.tensor([[1, 1]]), "in_place": True}, "in_place.*got counts"),
    ({"key": torch.zeros(1, 1, 31, 4).expand(1, 2, -1, -1), "in_place": True}, "memory, without gradient"),
    ({"key": torch.zeros(1, 2, 31, 4, requires_grad=True), "in_place": True}, "memory, without gradient"),
])  # fmt: skip
def test_what_does_not_fit_is_named(arguments, message):
    usual = {"key": torch.zeros(1, 2, 31, 4), "value": torch.zeros(1, 2, 31, 4)}
    usual["index"] = torch.zeros(1, 2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        compact_kv(**usual | arguments)


def test_sizes_of_the_shared_list_are_covered():
    """The odd sizes every kernel is tested at, as cache lengths with all and with no token kept."""
    for n in SIZES:
        x = rand(n, 1, 2, n, 8)
        every = torch.arange(n, device=DEVICE).expand(1, 2, -1)
        assert torch.equal(compact_kv(x, x, every)[0], x)
        assert compact_kv(x, x, every[..., :0])[0].shape == (1, 2, 0, 8)
