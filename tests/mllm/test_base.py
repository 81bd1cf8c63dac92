"""What visual-token methods share, and the baselines: counts, ties, wrappers, blocks, on small tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keeprate as kr
from keeprate.anatomy import multimodal
from keeprate.mllm.base import best
from keeprate.mllm.baselines import block_centres
from keeprate.mllm.encoder import Encoder

from ..conformance.multimodal import Models, inputs
from .test_selectors import visual

quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("base"))


def kept(reduction, i: int = 0) -> list[int]:
    there = slice(None) if reduction.valid is None else reduction.valid[i]
    return reduction.rep[i][there].tolist()


def test_padding_may_hold_anything_and_tokens_may_not():
    scores = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 3.0, 1.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert best(scores, torch.tensor([1, 1]), valid).tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(ValueError, match=r"NaN in samples \[0\]"):
        best(scores, torch.tensor([1, 1]))


# --- wrappers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["TRIM", "RecoverableCompression"])
def test_a_wrapper_leaves_the_count_to_a_base_that_counts_itself(models, name):
    model, batch = models("llava"), inputs("llava", (((1, 1),),), (12,))
    method = getattr(kr.mllm, name)
    with method(positions="keep")(model) as trace:
        want = model(**batch).logits
    with kr.mllm.GAP(base=method())(model) as wrapped:
        assert torch.equal(model(**batch).logits, want)
    assert torch.equal(wrapped.counts(), trace.counts())


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_a_wrapper_supports_what_its_base_does(models, name):
    with pytest.raises(ValueError, match=f"FlowCut does not support {name}"):
        kr.mllm.GAP(base=kr.mllm.FlowCut(keep=4))(models(name))
    with pytest.raises(ValueError, match="TrimmedLlama does not support"):
        kr.mllm.GAP(base=kr.mllm.TrimmedLlama())(models(name))


# --- baselines --------------------------------------------------------------------------------------------------------


def test_the_grid_is_its_formula_for_every_count():
    """Rounding must not move a token: (i + 1/2) n / k is often a whole number."""
    for n in (30, 48, 144):
        for k in range(1, n):
            reduction = kr.mllm.UniformGrid(keep=kr.Budget(tokens=k)).before(visual(torch.zeros(1, n, 1)))
            assert kept(reduction) == [(2 * i + 1) * n // (2 * k) for i in range(k)]


def test_needs_by_degree_come_before_chance():
    needed = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.2, 0.0]])
    for seed in range(20):
        t = visual(torch.zeros(1, 6, 1))
        t.generator.manual_seed(seed)
        assert kept(kr.mllm.OracleVisual(keep=3, needed=needed).before(t)) == [2, 3, 4]


@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5), st.integers(1, 60))
def test_blocks_are_no_more_than_allowed(views, count):
    """Views of any size, also without a token, beside an image that is padded."""
    place = torch.tensor([(v, r, c) for v, (rows, cols) in enumerate(views) for r in range(rows) for c in range(cols)])
    if len(place) < 2:
        return
    valid = torch.ones(2, len(place), dtype=torch.bool)
    valid[1, len(place) // 2 :] = False
    home = block_centres(place.expand(2, -1, -1), valid, torch.tensor([count, count]))
    own = home == torch.arange(len(place))
    for i, total in enumerate(valid.sum(1).tolist()):
        assert 1 <= int(own[i].sum()) <= min(count, total)
        assert (home[i][~valid[i]] == -1).all() and own[i][home[i][home[i] >= 0]].all()
        if count >= total:
            assert own[i, :total].all()


def test_a_small_view_takes_its_block_from_the_large_one():
    place = [(0, r, c) for r in range(14) for c in range(7)] + [(1, 0, 0), (2, 0, 0)]
    home = block_centres(torch.tensor([place]), None, torch.tensor([50]))
    assert home[0, 98:].tolist() == [98, 99]
    assert len(home[0].unique()) <= 50


# --- an image that keeps everything beside one that does not ----------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["TRIM", "RecoverableCompression", "VisionZip", "PruMerge", "Pooling"])
@pytest.mark.parametrize("model_name", ["llava_next", "llava_onevision"])
def test_an_image_that_keeps_everything_is_left_alone(models, model_name, name):
    """Nor may a weight, or a second way through the projector, change what is not reduced."""
    model = models(model_name)
    batch = inputs(model_name, (((1, 1),), ((2, 1.5),)), (12, 12))
    real = batch["attention_mask"][0].bool()
    want = model(**batch).logits[0, real]
    with getattr(kr.mllm, name)(keep=32)(model) as trace:
        got = model(**batch).logits[0, real]
    assert trace.kept[0][0][trace.kept[0][0] >= 0].tolist() == list(range(int(trace.total[0])))
    assert int((trace.kept[0][1] >= 0).sum()) <= 32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_visionzip_takes_the_class_token_of_the_whole_image(models):
    """Of several views, and of every image its own."""
    model, batch = models("llava_next"), inputs("llava_next", (((2, 1.5), (1, 1)), ((1, 2),)), (12, 14))
    parts, held, tower = multimodal(model), [], []
    hooks = [
        parts.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: held.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        parts.tower_layers[parts.feature].register_forward_hook(lambda block, args, output: tower.append(output)),
    ]
    try:
        with kr.mllm.VisionZip(keep=8)(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    x, views = held[0], [(pixels.abs().flatten(1).sum(1) > 0).sum().item() for pixels in batch["pixel_values"]]
    first = [0, views[0], views[0] + views[1]]  # the overview comes first
    assert len(tower[0]) == sum(views) and views[0] == 5
    token = parts.projector(tower[0][:, 0])
    for view, row in enumerate(torch.tensor([0, 0, 1]).repeat_interleave(torch.tensor(views)).tolist()):
        found = ((x[row] - token[view]).abs().amax(-1) < 1e-5).sum().item()
        assert found == (view in first), view


# --- the encoder asked by somebody else -------------------------------------------------------------------------------


@torch.no_grad()
def test_what_the_encoder_is_asked_besides_is_no_image_of_the_prompt(models):
    """A direct call of the vision tower inside the block: FlowCut leaves it whole, nothing of it stays behind."""
    model, batch = models("llava"), inputs("llava", (((1, 1),), ((1, 1),)), (12, 14))
    tower, pixels = model.model.vision_tower, batch["pixel_values"].flip(0)[:1]
    plain = tower(pixels).last_hidden_state
    method = kr.mllm.FlowCut(keep=6)
    with method(model) as trace:
        want = model(**batch).logits
        assert torch.equal(tower(pixels).last_hidden_state, plain)
        assert torch.equal(model(**batch).logits, want)
    assert torch.equal(trace.kept[0][:2], trace.kept[0][2:])
    parts = multimodal(model)
    encoder = Encoder(parts, (parts.feature,))
    with encoder.attach(model):
        model.model.get_image_features(batch["pixel_values"])
        want = encoder.received(parts.feature)
        tower(pixels)
        assert torch.equal(encoder.received(parts.feature), want)
