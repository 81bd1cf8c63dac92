"""Attention over index lists, flat segments and their merge, against float64: sizes, groups, padding, bias, strides."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import merge_attention, ragged_attention, selected_attention
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, SIZES, needs_triton, rand, three_way

module = importlib.import_module("keeprate_kernels.selected_attention")  # the package's attribute is the function
BACKENDS = [pytest.param("triton", marks=needs_triton), "reference"]


def draw_index(seed, *shape, n):
    """Positions in any order, repeated ones too."""
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw_mask(seed, *shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < share


def written_out(query, key, value, index, scaling, valid=None, bias=None, dtype=torch.float64):
    """(out [b, h, m, d], log-sum-exp [b, h, m]) with everything repeated, gathered and masked, in one dtype."""
    (b, h), g, d = query.shape[:2], key.shape[1], key.shape[3]
    q, k, v = (x.to(dtype) for x in (query, key, value))
    if index is not None:
        pick = index.long().expand(b, g, -1)
        if valid is not None:
            pick = pick.masked_fill(~valid.expand(b, g, -1), 0)
        k, v = (x.gather(2, pick[..., None].expand(-1, -1, -1, d)) for x in (k, v))
    k, v = (x.repeat_interleave(h // g, 1) for x in (k, v))
    logits = q @ k.mT * scaling
    if bias is not None:
        bias = bias if bias.shape[1] in (1, h) else bias.repeat_interleave(h // g, 1)
        logits = logits + bias.to(dtype)
    if valid is not None:
        logits = logits.masked_fill(~valid.expand(b, g, -1).repeat_interleave(h // g, 1)[:, :, None], float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


def check(query, key, value, index, scaling, **options):
    """Three ways, with and without the log-sum-exp."""
    exact = written_out(query, key, value, index, scaling, **options)
    low = written_out(query, key, value, index, scaling, **options, dtype=query.dtype)
    out, lse = selected_attention(query, key, value, index, scaling=scaling, **options, return_lse=True)
    alone = selected_attention(query, key, value, index, scaling=scaling, **options)
    assert out.dtype == alone.dtype == query.dtype and lse.dtype == torch.float32
    three_way([out, alone, lse], [low[0], low[0], low[1]], [exact[0], exact[0], exact[1]], tiny=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("k", SIZES)
def test_sizes_and_groups(k, group, dtype, name):
    d = {1: 64, 4: 20, 8: 33}[group]
    query = rand(k, 2, 2 * group, 1, d, dtype=dtype)
    key, value = rand(1, 2, 2, 300, d, dtype=dtype), rand(2, 2, 2, 300, d, dtype=dtype)
    with backend(name):
        check(query, key, value, draw_index(k, 2, 2, k, n=300), d**-0.5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("m", "heads", "bias"), [
    (3, 2, (2, 2, 3, 65)), (1, 1, (2, 8, 1, 65)), (17, 2, (2, 1, 1, 65)), (3, 1, (2, 8, 3, 65)), (3, 2, (2, 2, 1, 65)),
])  # fmt: skip
def test_padding_and_bias(m, heads, bias, name):
    query, key, value = rand(0, 2, 8, m, 16), rand(1, 2, 2, 100, 16), rand(2, 2, 2, 100, 16)
    index, valid = draw_index(0, 2, heads, 65, n=100), draw_mask(1, 2, heads, 65)
    valid[1, -1] = False  # a head with nothing to see
    bias = 3 * rand(3, *bias)
    hidden = bias.masked_fill(draw_mask(4, *bias.shape, share=0.2), float("-inf"))
    with backend(name):
        check(query, key, value, index, 0.3, valid=valid)
        check(query, key, value, index, 0.3, bias=bias)
        check(query, key, value, index, 0.3, valid=valid, bias=hidden)
        check(query, key, value, None, 0.3, valid=draw_mask(5, 2, heads, 100))
        out, lse = selected_attention(query, key, value, index, scaling=1.0, valid=valid, return_lse=True)
    blind = slice(4, 8) if heads == 2 else slice(0, 8)
    assert not out[1, blind].any() and lse[1, blind].isneginf().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_and_tokens_not_chosen_are_never_read(name):
    query, key, value = rand(0, 1, 4, 2, 16), rand(1, 1, 2, 90, 16), rand(2, 1, 2, 90, 16)
    index, valid = draw_index(0, 1, 2, 40, n=60), draw_mask(1, 1, 2, 40)
    valid[0, 1] = False
    chosen = torch.zeros(1, 2, 90, dtype=torch.bool, device=DEVICE)
    chosen[0, 0, index[0, 0][valid[0, 0]]] = True
    with backend(name):
        clean = selected_attention(query, key, value, index, scaling=0.3, valid=valid, return_lse=True)
        dirty = [x.masked_fill(~chosen[..., None], float("nan")) for x in (key, value)]
        dirty[0][:, 1], dirty[1][:, 1] = key[:, 1], value[:, 1]
        for wrong in (-1, 10**9, 70):
            odd = torch.where(valid, index, wrong)
            found = selected_attention(query, *dirty, odd, scaling=0.3, valid=valid, return_lse=True)
            torch.testing.assert_close(found, clean, rtol=0, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["slice of a buffer", "heads inside tokens", "keys and values interleaved", "odd"])
def test_strides(kind, name):
    if kind == "slice of a buffer":
        key, value = rand(0, 2, 2, 150, 16)[:, :, 20:120], rand(1, 2, 2, 170, 16)[:, :, :100]
    elif kind == "heads inside tokens":
        key, value = (rand(i, 2, 100, 2, 16).transpose(1, 2) for i in (0, 1))
    elif kind == "keys and values interleaved":
        key, value = rand(0, 2, 2, 100, 48)[..., :16], rand(1, 2, 2, 100, 2, 16)[..., 1, :]
    else:
        key, value = rand(0, 2, 2, 16, 100).mT, rand(1, 1, 2, 100, 32)[..., ::2].expand(2, -1, -1, -1)
    assert key.shape == value.shape == (2, 2, 100, 16) and not key.is_contiguous()
    query = rand(2, 2, 5, 8, 16).transpose(1, 2)
    index = draw_index(0, 2, 80, 2, n=100).mT[:, :, ::2]
    valid, bias = draw_mask(1, 2, 80, 2).mT[:, :, ::2], rand(3, 2, 8, 40, 5).mT
    with backend(name):
        check(query, key, value, index, 0.25, valid=valid, bias=bias)
        check(query, key, value, index.int(), 0.25)
        check(query, key, value, None, 0.25)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    query, key, value = rand(0, 1, 4, 2, 16), rand(1, 1, 2, 257, 16), rand(2, 1, 2, 257, 16)
    valid = draw_mask(0, 1, 2, 257)
    valid[..., :64] = False  # a split that sees nothing
    flat = [x[0].reshape(-1, 16) for x in (key, value)]
    with backend("triton"):
        check(query, key, value, draw_index(0, 1, 2, 257, n=257), 0.25, valid=valid)
        offsets = torch.tensor([0, 257, 514], device=DEVICE)
        out = ragged_attention(query, *flat, offsets, scaling=0.25, valid=valid.flatten())
    three_way(out, *(written_out(query, key, value, None, 0.25, valid, dtype=t)[0] for t in (out.dtype, torch.float64)))


@pytest.mark.parametrize("name", BACKENDS)
def test_everything_selected_is_full_attention(name):
    query, key, value = rand(0, 2, 8, 1, 32), rand(1, 2, 2, 65, 32), rand(2, 2, 2, 65, 32)
    every = torch.arange(65, device=DEVICE).expand(2, 1, -1)
    whole = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with backend(name):
        for index in (every, every.flip(2), None):
            out = selected_attention(query, key, value, index, scaling=32**-0.5)
            torch.testing.assert_close(out, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_selected_gives_nothing(name):
    query, none = rand(0, 2, 4, 3, 16), torch.zeros(2, 2, 0, dtype=torch.long, device=DEVICE)
    dense, flat = rand(1, 2, 2, 20, 16), rand(2, 0, 16)
    with backend(name):
        for out, lse in (
            selected_attention(query, dense, dense, none, scaling=1.0, return_lse=True),
            selected_attention(query, dense[:, :, :0], dense[:, :, :0], None, scaling=1.0, return_lse=True),
            ragged_attention(query, flat, flat, torch.zeros(5, dtype=torch.long, device=DEVICE), scaling=1.0,
                             return_lse=True),
        ):  # fmt: skip
            assert out.shape == query.shape and not out.any()
            assert lse.shape == (2, 4, 3) and lse.isneginf().all()


def ragged(seed, counts, d, dtype=torch.float32, spare=0):
    """(key, value, offsets) of flat storage, and the same padded with what hides the padding."""
    counts = torch.tensor(counts, device=DEVICE)
    key, value = (rand(seed + i, int(counts.sum()), d + spare, dtype=dtype)[:, :d] for i in (0, 1))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    place = torch.arange(int(counts.max()), device=DEVICE)
    there = place < counts[:, None]
    row = torch.where(there, offsets[:-1, None] + place, 0)
    return (key, value, offsets), (key[row], value[row], there)


def check_ragged(query, flat, padded, valid=None):
    b = len(query)
    key, value, there = (x.view(b, -1, *x.shape[1:]) for x in padded)
    offsets = flat[2]
    if valid is not None:
        row = torch.where(padded[2], offsets[:-1, None] + torch.arange(there.shape[2], device=DEVICE), 0)
        there = there & valid[row].view(there.shape)
    exact, low = (written_out(query, key, value, None, 0.2, there, dtype=t) for t in (torch.float64, query.dtype))
    found = ragged_attention(query, *flat, scaling=0.2, valid=valid, return_lse=True)
    alone = ragged_attention(query, *flat, scaling=0.2, valid=valid)
    assert alone.dtype == query.dtype and found[1].dtype == torch.float32
    three_way([*found, alone], [*low, low[0]], [*exact, exact[0]], tiny=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "group", "m"), [
    ([1, 31, 65, 257], 4, 1), ([257, 0, 1, 0], 1, 3), ([64, 64], 8, 17), ([0, 129], 8, 1), ([1, 1, 1, 1], 2, 1),
])  # fmt: skip
def test_ragged_heads(counts, group, m, dtype, name):
    b, d = 2, 24 if m == 3 else 32
    query = rand(0, b, len(counts) // b * group, m, d, dtype=dtype)
    flat, padded = ragged(1, counts, d, dtype, spare=8 if group == 1 else 0)
    with backend(name):
        check_ragged(query, flat, padded)
        valid = draw_mask(2, len(flat[0]))
        valid[: counts[0]] = False
        check_ragged(query, flat, padded, valid)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(any), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 2**31 - 1), st.sampled_from([1, 7, 128]), st.sampled_from([0, 2, 9]), st.booleans(),
)  # fmt: skip
def test_the_ragged_reference_in_any_blocks_and_padded(counts, group, m, seed, chunk, waste, masked):
    query = rand(seed, 1, len(counts) * group, m, 5)
    flat, padded = ragged(seed + 1, counts, 5)
    with pytest.MonkeyPatch.context() as patch, backend("reference"):
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "WASTE", waste)
        check_ragged(query, flat, padded, draw_mask(seed, len(flat[0])) if masked else None)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_to_the_whole(dtype, name):
    query, key, value = (rand(i, 2, h, n, 32, dtype=dtype) for i, (h, n) in enumerate(((8, 2), (2, 130), (2, 130))))
    query *= 5  # parts of very different weight
    valid = draw_mask(0, 2, 2, 130)
    valid[0, 0] = False
    valid[1, :, :40] = False  # the first part sees nothing
    exact, low = (written_out(query, key, value, None, 0.5, valid, dtype=t) for t in (torch.float64, dtype))
    with backend(name):
        outs, lses = [], []
        for part in (slice(0, 40), slice(40, 41), slice(41, 130)):
            tokens = torch.arange(130, device=DEVICE)[part].expand(2, 1, -1)
            out, lse = selected_attention(
                query, key, value, tokens, scaling=0.5, valid=valid[:, :, part], return_lse=True
            )
            outs.append(out.masked_fill(lse.isneginf()[..., None], float("nan")))  # weighs nothing, whatever it holds
            lses.append(lse)
        found = merge_attention(outs, lses, return_lse=True)
        assert torch.equal(merge_attention(outs, lses), found[0]) and found[0].dtype == dtype
        three_way(found, low, exact, tiny=2e-6)
        torch.testing.assert_close(merge_attention(outs[2:], lses[2:]), outs[2].nan_to_num(0.0))


@needs_triton
def test_kernel_and_reference_agree():
    query, key, value = rand(0, 2, 8, 3, 32), rand(1, 2, 2, 257, 32), rand(2, 2, 2, 257, 32)
    index, flat = draw_index(0, 2, 2, 200, n=257), ragged(3, [200, 3, 0, 100], 32)[0]
    found = {}
    for name in ("triton", "reference"):
        with backend(name):
            found[name] = (*selected_attention(query, key, value, index, scaling=0.2, return_lse=True),
                           *ragged_attention(query, *flat, scaling=0.2, return_lse=True))  # fmt: skip
    torch.testing.assert_close(found["triton"], found["reference"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("return_lse", [True, False])
def test_gradients_flow_through_the_reference(return_lse):
    query, key, value = (
        rand(i, 1, h, n, 3).double().requires_grad_() for i, (h, n) in enumerate(((4, 2), (2, 9), (2, 9)))
    )
    index, valid, bias = draw_index(0, 1, 2, 6, n=9), draw_mask(1, 1, 2, 6, share=0.7), rand(4, 1, 4, 2, 6).double()
    valid[..., 0] = True
    options = {"scaling": 0.5, "return_lse": return_lse}

    def dense(q, k, v, x):
        return selected_attention(q, k, v, index, valid=valid, bias=x, **options)

    def flat(q, k, v, cut):
        offsets = torch.tensor([0, cut, 18], device=DEVICE)
        return ragged_attention(q, k.reshape(18, 3), v.reshape(18, 3), offsets, **options)

    assert torch.autograd.gradcheck(dense, (query, key, value, bias.requires_grad_()))
    for cut in (4, 8, 9):  # in blocks, padded, a view
        assert torch.autograd.gradcheck(lambda *x, cut=cut: flat(*x, cut), (query, key, value))
    single = [x.detach().float().requires_grad_() for x in (query, key, value)]
    if DEVICE.type == "cuda":  # where the kernel would have run
        assert selected_attention(*single, index, scaling=0.5).requires_grad


def test_nothing_as_long_as_the_cache_is_made():
    key = rand(0, 1, 2, 5000, 8)[:, :, 1:]
    given = key.untyped_storage().data_ptr()

    class Largest(torch.overrides.TorchFunctionMode):
        elements = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != given:
                Largest.elements = max(Largest.elements, out.numel())
            return out

    index = draw_index(0, 1, 2, 64, n=4999)
    with Largest():
        selected_attention(rand(1, 1, 4, 1, 8), key, key, index, scaling=1.0, return_lse=True)
    assert 0 < Largest.elements <= 2 * 64 * 8


@pytest.mark.parametrize(("change", "message"), [
    ({"query": (4, 1, 8)}, r"query must be.*\(4, 1, 8\)"),
    ({"query": (1, 3, 1, 8)}, r"multiple of key heads; got \(1, 3, 1, 8\)"),
    ({"query": (2, 4, 1, 8)}, r"agree in batch.*\(2, 4, 1, 8\) and \(1, 2, 20, 8\)"),
    ({"value": (1, 2, 19, 8)}, r"key and value.*\(1, 2, 19, 8\)"),
    ({"key": (1, 2, 20, 7), "value": (1, 2, 20, 7)}, r"with dim 8.*\(1, 2, 20, 7\)"),
    ({"index": (1, 4, 5)}, r"index must be.*\[1, 2 or 1, k\]; got torch.int64 \(1, 4, 5\)"),
    ({"valid": (1, 2, 6)}, r"valid must be boolean \[1, 2 or 1, 5\]; got torch.bool \(1, 2, 6\)"),
    ({"bias": (1, 3, 1, 5)}, r"bias must be.*\[1, 2 or 4 or 1, 1 or 1, 5\].*\(1, 3, 1, 5\)"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"query": (1, 4, 1, 8), "key": (1, 2, 20, 8), "value": (1, 2, 20, 8), "index": (1, 2, 5)} | change
    kinds = {"index": torch.long, "valid": torch.bool}
    with pytest.raises(ValueError, match=message):
        selected_attention(scaling=1.0, **{k: torch.zeros(v, dtype=kinds.get(k)) for k, v in shapes.items()})


def test_positions_and_offsets_are_checked_on_a_cpu():
    x = torch.zeros(1, 2, 20, 8)
    index = torch.tensor([[[0, 20]]])
    with pytest.raises(ValueError, match=r"positions in 0\.\.19; got 0\.\.20"):
        selected_attention(x, x, x, index, scaling=1.0)
    with pytest.raises(ValueError, match=r"key and value must be .* torch.float32; got torch.float16"):
        selected_attention(x, x.half(), x.half(), None, scaling=1.0)
    flat = torch.zeros(20, 8)
    for offsets in ([0, 5, 19], [1, 5, 20], [0, 21, 20]):
        with pytest.raises(ValueError, match=r"offsets must rise from 0 to 20; got \["):
            ragged_attention(x, flat, flat, torch.tensor(offsets), scaling=1.0)
    with pytest.raises(ValueError, match=r"offsets must be .* got torch.int64 \(4,\)"):
        ragged_attention(x, flat, flat, torch.tensor([0, 5, 9, 20]), scaling=1.0)
    with pytest.raises(ValueError, match=r"valid must be boolean \[20\]"):
        ragged_attention(x, flat, flat, torch.tensor([0, 5, 20]), scaling=1.0, valid=torch.ones(20))
    for outs, lses in (([], []), ([x], []), ([x, x[..., :4]], [x[..., 0]] * 2), ([x], [x])):
        with pytest.raises(ValueError, match="outs and lses must be equally many"):
            merge_attention(outs, lses)
