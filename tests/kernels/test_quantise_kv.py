"""Packed keys and values: error bounds from the mathematics, storage that is small, kernels equal to the reference."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import Packed, dequantise, quantise, quantise_kv, quantise_mixed
from keeprate_kernels.quantise_kv import BITS, SCHEMES, _up
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, SIZES, needs_triton, rand, three_way

MODULE = sys.modules["keeprate_kernels.quantise_kv"]  # as an attribute the name is the function
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def parts(packed: Packed, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """codes [b, g, n, d] and low, step, scale broadcastable to them, read off the definition of the layout."""
    n, d = packed.shape[2:]
    width = packed.data.shape[3]
    channel = torch.arange(d, device=packed.data.device)
    code = (packed.data[..., channel % width].long() >> (channel // width * packed.bits)) & (2**packed.bits - 1)
    group = packed.group_size or max(n, 1)
    rows = torch.arange(n, device=packed.data.device) // group if packed.scheme == "channel" else slice(None)
    low, step = packed.low[:, :, rows], packed.step[:, :, rows]
    scale = torch.ones(1, device=packed.data.device) if packed.scale is None else packed.scale
    return code.to(dtype), low.to(dtype), step.to(dtype), scale.to(dtype)


def exact(packed: Packed, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What the packed numbers stand for, written out."""
    code, low, step, scale = parts(packed, dtype)
    return (low + code * step) * scale


def assert_bound(x: torch.Tensor, packed: Packed, valid: torch.Tensor | None = None) -> None:
    """|x - x'| <= c step / 2. Rounding to fp32 moves a code's border by up to 3 L 2^-24 steps, and x / c by 2^-24."""
    _, _, step, scale = parts(packed, torch.float64)
    x, top = x.double(), 2**packed.bits - 1
    allowed = scale * step * (0.5 + 3 * top * 2**-24) + 2**-22 * x.abs() + top * 2**-126
    excess = (x - exact(packed)).abs() - allowed
    assert (excess if valid is None else excess[valid.expand(x.shape[:3])]).le(0).all(), excess.max()


def same(a: Packed, b: Packed) -> None:
    """Equal to the bit."""
    assert (a.bits, a.dim, a.dtype, a.scheme, a.group_size) == (b.bits, b.dim, b.dtype, b.scheme, b.group_size)
    for name in ("data", "low", "step", "scale"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (31, 8), (65, 33), (257, 64)])
def test_every_element_lies_within_half_a_step(n, d, scheme, bits, dtype):
    x = (rand(n, 2, 3, n, d) * torch.logspace(-2, 2, d, device=DEVICE) + 3).to(dtype)
    packed = quantise(x, bits, scheme)
    assert packed.shape == x.shape and packed.n == n and packed.data.shape[3] == -(-d * bits // 8)
    assert packed.low.dtype == packed.step.dtype == dtype
    assert packed.low.shape == packed.step.shape == ((2, 3, 1, d) if scheme == "channel" else (2, 3, n, 1))
    assert_bound(x, packed)


finite = {
    torch.float32: st.floats(-(2.0**63), 2.0**63, width=32),
    torch.float16: st.floats(-65504, 65504, width=16),
    torch.bfloat16: st.floats(-(2.0**63), 2.0**63, width=32),
}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(ALL_DTYPES), st.sampled_from(SCHEMES), st.sampled_from(BITS))
def test_any_numbers_keep_the_bound(data, dtype, scheme, bits):
    n, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    numbers = data.draw(st.lists(finite[dtype], min_size=n * d, max_size=n * d))
    x = torch.tensor(numbers, device=DEVICE).to(dtype).view(1, 1, n, d)
    assert_bound(x, quantise(x, bits, scheme))


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_come_back_as_exactly_as_torch_gives_them(scheme, bits, backend_name):
    for dtype in DTYPES:
        x = (rand(bits, 1, 2, 31, 20) + 1).to(dtype)
        packed = quantise(x, bits, scheme)
        with backend(backend_name):
            found = dequantise(packed)
            assert torch.equal(packed.dequantise(torch.float32).to(dtype), found)
        assert found.dtype == dtype and found.is_contiguous()
        three_way(found, exact(packed, dtype), exact(packed))


@needs_triton
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "d", "bits"), [(1, 1, 2), (31, 16, 4), (65, 33, 2), (65, 7, 8), (257, 8, 4)])
def test_kernels_write_the_same_bits_as_the_reference(n, d, bits, scheme):
    """Ties included: both compute floor(t + 1/2) of the same IEEE quotient."""
    for dtype in DTYPES:
        x = rand(n, 1, n, 2, d).to(dtype).transpose(1, 2)  # as every transformers layer hands them over
        valid = rand(n + 1, 1, 1, n) > -1
        with backend("reference"):
            one = quantise(x, bits, scheme, valid)
        with backend("triton"):
            other = quantise(x, bits, scheme, valid)
        same(one, other)


@needs_triton
@pytest.mark.parametrize("group_size", [1, 20, 64, 100])
def test_kernels_in_groups_of_tokens(group_size):
    x = rand(0, 1, 1, 65, 12) if group_size > 1 else rand(0, 1, 1, 5, 12)
    with backend("reference"):
        one = quantise(x, 4, group_size=group_size)
        numbers = one.dequantise()
    with backend("triton"):
        other = quantise(x, 4, group_size=group_size)
        same(one, other)
        torch.testing.assert_close(other.dequantise(), numbers, atol=1e-6, rtol=1e-6)  # fused multiply-add on a GPU


@needs_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_step_over_padding_that_is_not_a_number(scheme):
    x, valid = rand(0, 2, 2, 31, 9), rand(1, 2, 2, 31) > 0
    valid[1, 1] = False  # a head that is all padding
    x[~valid] = torch.nan
    with backend("reference"):
        one = quantise(x, 2, scheme, valid)
    with backend("triton"):
        other = quantise(x, 2, scheme, valid)
        assert other.dequantise().isfinite().all()
    same(one, other)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_a_group_of_tokens_is_quantised_as_if_it_stood_alone(n, bits):
    x = rand(n, 2, 2, n, 10)
    whole = quantise(x, bits, group_size=32)
    assert whole.low.shape == (2, 2, -(-n // 32), 10)
    assert_bound(x, whole)
    for i, piece in enumerate(x.split(32, 2)):
        alone = quantise(piece, bits)
        assert torch.equal(whole.data[:, :, 32 * i : 32 * i + 32], alone.data)
        assert torch.equal(whole.low[:, :, i : i + 1], alone.low)
        assert torch.equal(whole.dequantise()[:, :, 32 * i : 32 * i + 32], alone.dequantise())


def test_layout_and_ties_on_numbers_done_by_hand():
    # one token with low 0 and step 1: ties of t = 0.5, 1.5, 2.5 go up
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], device=DEVICE).view(1, 1, 1, 7)
    packed = quantise(x, 2, "token")
    assert (packed.low.item(), packed.step.item()) == (0.0, 1.0)
    # codes 0 1 1 2 2 3 3 in two bytes: channels 0 2 4 6 from the lowest bits up, then 1 3 5 and nothing
    assert packed.data.flatten().tolist() == [0 + 1 * 4 + 2 * 16 + 3 * 64, 1 + 2 * 4 + 3 * 16]
    assert packed.dequantise().flatten().tolist() == [0, 1, 1, 2, 2, 3, 3]
    # channel scales of the separable scheme: c = sqrt(4), sqrt(9)
    x = torch.tensor([[4.0, 9.0], [-2.0, 3.0]], device=DEVICE).view(1, 1, 2, 2)
    packed = quantise(x, 8, "separable")
    assert packed.scale.flatten().tolist() == [2.0, 3.0]
    assert packed.low.flatten().tolist() == [2.0, -1.0] and packed.data.tolist() == [[[[0, 255], [0, 255]]]]
    torch.testing.assert_close(packed.step.flatten() * 255, torch.tensor([1.0, 2.0], device=DEVICE))


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_and_whole_grids_come_back_exactly(dtype, backend_name):
    with backend(backend_name):
        constant = rand(0, 1, 2, 1, 5).to(dtype).expand(1, 2, 9, 5)
        for bits in BITS:
            packed = quantise(constant, bits)
            assert not packed.step.any() and torch.equal(packed.dequantise(), constant)
        packed = quantise(constant.transpose(2, 3), 2, "token")
        assert not packed.step.any() and torch.equal(packed.dequantise(), constant.transpose(2, 3))
        zero = torch.zeros(1, 1, 3, 4, device=DEVICE, dtype=dtype)
        for scheme in SCHEMES:
            assert torch.equal(quantise(zero, 2, scheme).dequantise(), zero)
        for bits in BITS:  # 0 ... L: step 1; bf16's 8 significant bits hold 255
            grid = torch.arange(2**bits, device=DEVICE).to(dtype).view(1, 1, -1, 1)
            assert torch.equal(quantise(grid, bits).dequantise(), grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_up_gives_the_next_number(dtype):
    x = torch.cat([rand(0, 500), rand(1, 500) * 1e-7, rand(2, 500) * 1e4, torch.zeros(1, device=DEVICE)])
    up = _up(x, dtype)
    assert (up.float() >= x).all()
    # the number below `up` is below x: nothing between them was passed over
    bits = up.view(torch.int16)
    below = torch.where(up > 0, bits - 1, bits + 1).view(dtype).float()
    moved = up.float() != 0
    assert (below < x)[moved].all() and (x <= 0)[~moved].all()
    kept = rand(3, 500).to(dtype)
    assert torch.equal(_up(kept.float(), dtype), kept)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_influences_nothing(scheme):
    x, n = rand(0, 2, 2, 40, 12), 33
    valid = torch.ones(2, 1, 40, dtype=torch.bool, device=DEVICE)
    valid[:, :, n:] = False
    alone = quantise(x[:, :, :n], 4, scheme)
    for filler in (1e30, torch.nan, -torch.inf):
        x[:, :, n:] = filler
        packed = quantise(x, 4, scheme, valid)
        assert torch.equal(packed.data[:, :, :n], alone.data) and not packed.data[:, :, n:].any()
        assert torch.equal(packed.dequantise()[:, :, :n], alone.dequantise())
        assert packed.dequantise().isfinite().all()
    # a head without any token
    assert (
        quantise(x, 4, scheme, valid & (torch.arange(2, device=DEVICE) > 0)[:, None, None])
        .dequantise()
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_refused(bad, scheme, backend_name):
    with backend(backend_name):
        for place in ((0, 0, 0, 0), (0, 0, 4, 2)):
            x = rand(0, 1, 1, 5, 3)
            x[place] = bad
            with pytest.raises(ValueError, match="finite"):
                quantise(x, 4, scheme)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_storage_is_as_small_as_the_bits_promise(bits, dtype):
    n, d = 1024, 64
    key, value = rand(0, 1, 2, n, d).to(dtype), rand(1, 1, 2, n, d).to(dtype)
    keys, values = quantise_kv(key, value, bits)
    for packed in (keys, values):
        held = [t for t in (packed.data, packed.low, packed.step, packed.scale) if t is not None]
        assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in held)
        assert packed.data.untyped_storage().nbytes() == 2 * n * d * bits // 8
    itemsize = key.element_size()
    assert keys.nbytes == 2 * (n * d * bits // 8 + 2 * d * itemsize)
    assert values.nbytes == 2 * (n * d * bits // 8 + 2 * n * itemsize + d * itemsize)
    # beside fp16: bits / 16, and 1 / 32 more for the (low, step) of a token of 64 channels
    if itemsize == 2:
        assert keys.nbytes / key.nbytes <= bits / 16 + 0.002 and values.nbytes / key.nbytes <= bits / 16 + 0.033


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_bits_never_hurt(scheme):
    x = rand(0, 1, 2, 300, 64)
    errors = [(quantise(x, bits, scheme).dequantise() - x).square().mean() for bits in BITS]
    # levels grow by factors of 5 and 17: so does the root of the error
    assert 4**2 < errors[0] / errors[1] < 6**2 and 14**2 < errors[1] / errors[2] < 20**2


def test_separate_channels_pay_where_one_channel_is_large():
    x = rand(0, 1, 2, 300, 64)
    x[..., 5] *= 50
    token, separable = ((quantise(x, 4, s).dequantise() - x).square().mean() for s in ("token", "separable"))
    assert separable < 0.2 * token


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", SIZES)
def test_strides_batches_and_heads(n, scheme):
    x = rand(n, 2, n, 3, 22)[..., ::2].transpose(1, 2)
    before = x.clone()
    assert n == 1 or not x.is_contiguous()
    packed = quantise(x, 4, scheme)
    same(packed, quantise(x.contiguous(), 4, scheme))
    assert torch.equal(x, before)
    for b in range(2):
        for g in range(3):
            alone = quantise(x[b : b + 1, g : g + 1], 4, scheme)
            assert torch.equal(alone.data[0, 0], packed.data[b, g]) and torch.equal(alone.step[0, 0], packed.step[b, g])


def test_many_chunks_are_one(monkeypatch):
    x, valid = rand(0, 2, 2, 65, 12), rand(1, 2, 1, 65) > 0
    for scheme, group_size in (("channel", None), ("channel", 16), ("token", None), ("separable", None)):
        whole = quantise(x, 2, scheme, valid, group_size=group_size)
        numbers = whole.dequantise()
        with monkeypatch.context() as patch, backend("reference"):
            patch.setattr(MODULE, "CHUNK", 300)
            same(quantise(x, 2, scheme, valid, group_size=group_size), whole)
            torch.testing.assert_close(whole.dequantise(), numbers, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_taking_tokens_changes_no_bit_of_them(scheme):
    x = rand(0, 2, 3, 31, 10)
    packed = quantise(x, 4, scheme)
    for m in (0, 1, 17, 31):
        index = rand(m, 2, 3, 31).argsort(-1)[..., :m]
        taken = packed.take(index)
        assert taken.n == m and torch.equal(
            taken.dequantise(), packed.dequantise().gather(2, index[..., None].expand(-1, -1, -1, 10))
        )
        assert taken.nbytes <= packed.nbytes
    with pytest.raises(ValueError, match="index must be"):
        packed.take(torch.zeros(2, 1, 4, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match="group_size"):
        quantise(x, 4, group_size=8).take(index)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_no_trouble(scheme, backend_name):
    with backend(backend_name):
        packed = quantise(rand(0, 1, 2, 0, 8), 4, scheme)
        assert packed.n == 0 and packed.dequantise().shape == (1, 2, 0, 8) and packed.low.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 13, 31])
def test_two_precisions_by_importance(count):
    key, value = rand(0, 2, 3, 31, 8), rand(1, 2, 3, 31, 16)
    valid = torch.ones(2, 1, 31, dtype=torch.bool, device=DEVICE)
    valid[0, 0, :4] = False
    salient = torch.zeros(2, 3, 31, dtype=torch.bool, device=DEVICE)
    salient.scatter_(2, rand(2, 2, 3, 31).argsort(-1)[..., :count], True)
    fine, coarse = quantise_mixed(key, value, salient, bits=(8, 2), valid=valid)
    assert torch.equal(torch.zeros_like(salient).scatter_(2, fine[2], True), salient)
    assert torch.equal(
        torch.cat([fine[2], coarse[2]], 2).sort(-1).values, torch.arange(31, device=DEVICE).expand(2, 3, -1)
    )
    for (keys, values, index), bits in ((fine, 8), (coarse, 2)):
        assert keys.bits == values.bits == bits and (keys.scheme, values.scheme) == ("channel", "separable")
        assert index.shape == (2, 3, keys.n) and (index.diff(dim=-1) > 0).all()
        real = valid.expand(2, 3, -1).gather(2, index)
        assert_bound(key.gather(2, index[..., None].expand(-1, -1, -1, 8)), keys, real)
        assert_bound(value.gather(2, index[..., None].expand(-1, -1, -1, 16)), values, real)


def test_bad_arguments_say_what_is_allowed():
    x = rand(0, 2, 3, 5, 4)
    bad = [
        (lambda: quantise(x[0], 4), r"\[batch, heads, tokens, dim\].*\(3, 5, 4\)"),
        (lambda: quantise(x[..., :0], 4), "dim of at least 1"),
        (lambda: quantise(x.double(), 4), "float32.*float64"),
        (lambda: quantise(x, 3), "one of 2, 4, 8; got 3"),
        (lambda: quantise(x, 4, "row"), "'channel', 'token', 'separable'; got 'row'"),
        (lambda: quantise(x, 4, "token", group_size=2), "group_size goes with"),
        (lambda: quantise(x, 4, group_size=0), "at least 1; got 0"),
        (lambda: quantise(x, 4, valid=torch.ones(2, 3, 6, dtype=torch.bool)), r"\[2, 3\|1, 5\]; got .*\(2, 3, 6\)"),
        (lambda: quantise(x, 4, valid=torch.ones(2, 3, 5)), "boolean"),
        (lambda: quantise(torch.full((1, 1, 2, 1), 3e38) * torch.tensor([[1.0], [-1.0]]), 2), "span"),
        (lambda: quantise_kv(x, x[:, :, :4]), r"agree in the first three.*\(2, 3, 4, 4\)"),
        (lambda: quantise_mixed(x, x, torch.ones(2, 3, 4, dtype=torch.bool)), r"boolean \(2, 3, 5\)"),
        (
            lambda: quantise_mixed(x, x, torch.eye(5, dtype=torch.bool).cumsum(0)[None, :3].expand(2, -1, -1) > 0),
            "1 to 3",
        ),
        (lambda: quantise_mixed(x, x, torch.ones(2, 3, 5, dtype=torch.bool), bits=(4,)), "two numbers"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_part_that_is_a_view_is_counted_in_full():
    packed = quantise(rand(0, 1, 1, 64, 8), 8)
    assert replace(packed, data=packed.data[:, :, :2]).nbytes == packed.nbytes


def test_a_step_below_fp32s_smallest_does_not_wrap_around():
    x = torch.tensor([0.0, 380 * 2.0**-149]).view(1, 1, 2, 1)  # 380 / 255 rounds to 1 times 2^-149
    packed = quantise(x, 8)
    assert packed.step.item() == 2.0**-149 and packed.data.flatten().tolist() == [0, 255]
