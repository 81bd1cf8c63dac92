"""What the vision encoder did, in the order of the visual tokens: places, attention and keys of every architecture.

Each fact is checked against the encoder run on its own, or against coordinates worked out by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

import keeprate as kr
from keeprate.anatomy import multimodal
from keeprate.mllm.encoder import Encoder

from ..conformance.multimodal import MULTIMODAL, Models, inputs, pictures

CHECKPOINTS = [name for name, row in MULTIMODAL.items() if row[0] != "mllama"]
IMAGES = (((2, 1.5),), ((1, 1.5), (1, 1)))  # one picture, and two in a prompt


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("encoder"))


class Seen:
    """An encoder that has watched one batch; the visual tokens that went into the language model."""

    def __init__(self, model, name: str, images=IMAGES):
        self.model, self.name, self.parts = model, name, multimodal(model)
        self.batch = inputs(name, images, [14] * len(images))
        self.encoder = Encoder(self.parts, tuple(range(len(self.parts.tower_layers))))
        with torch.no_grad(), self.encoder.attach(model):
            given = {k: v for k, v in self.batch.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
            if name == "llava_onevision":
                given["batch_num_images"] = self.batch["batch_num_images"]
            self.features = torch.cat(tuple(self.parts.inner.get_image_features(**given).pooler_output))
        self.drawn = [p for sample in pictures(name, images) for p in sample]

    def patches(self) -> torch.Tensor:
        """[views, patches, 3] view, row and column of every patch, as the encoder holds them."""
        if self.name == "qwen2_5_vl":
            grids = self.batch["image_grid_thw"]
            spot = get_vision_position_ids(grids, 2).float()  # patches, 2
            picture = torch.arange(len(grids)).repeat_interleave(grids.prod(1))[:, None]
            spot = torch.cat([picture, spot], 1)
            index = self.encoder._window
            return spot.view(-1, 4, 3)[index].view(1, -1, 3)
        views, patches = self.encoder._input.shape[:2]
        if self.name == "internvl":
            views, patches = len(self.batch["pixel_values"]), 64
        side = round(patches**0.5)
        spot = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
        return torch.cat(
            [torch.arange(views)[:, None, None].expand(-1, patches, 1), spot.expand(views, -1, -1)], 2
        ).float()


@pytest.fixture(scope="module")
def seen(models):
    held = {}

    def get(name: str) -> Seen:
        if name not in held:
            held[name] = Seen(models(name), name)
        return held[name]

    return get


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lengths_and_line_ends(seen, name):
    s = seen(name)
    assert sum(s.encoder.lengths) == sum(p.tokens for p in s.drawn) == len(s.features)
    assert int(s.encoder.line_ends().sum()) == sum(p.ends for p in s.drawn)
    if s.drawn[0].ends:  # line ends are the newline embedding, and nothing else is
        newline = (s.features == s.parts.inner.image_newline).all(1)
        assert torch.equal(newline, s.encoder.line_ends())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_projected_features_are_the_visual_tokens(seen, name):
    s = seen(name)
    with torch.no_grad():
        again = s.encoder.project(s.encoder.features())
    real = ~s.encoder.line_ends()
    if name == "llava_onevision":  # the first picture is interpolated behind the projector, which is not linear
        real[: s.drawn[0].tokens] = False
    torch.testing.assert_close(again[real], s.features[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_token_lies_where_its_patches_lie(seen, name):
    """Coordinates sent through `tokens` come out as `places`, or as the middle of the patches that make a token."""
    s = seen(name)
    real = ~s.encoder.line_ends()
    if name == "llava_onevision":
        real[: s.drawn[0].tokens] = False  # between several tiles a place is a mean
    places, spot = s.encoder.places(), s.encoder.tokens(s.patches())[:, 1:]
    scale, offset = (2, 0.5) if s.encoder.group == 4 else (1, 0)
    assert torch.equal(spot[real], places[real][:, 1:] * scale + offset)
    assert (places[~real & s.encoder.line_ends()] == -1).all()


def test_places_of_any_resolution_by_hand(seen):
    """(2, 1.5) tiles of 4 x 4: the overview, then eight rows of six columns, cut on both sides to fit the picture."""
    s = seen("llava_next")
    places = s.encoder.places()[: s.drawn[0].tokens].tolist()
    overview = [[0, r, c] for r in range(4) for c in range(4)]
    assert places[:16] == overview
    tiles = [
        [1 + 2 * (r // 4) + (c // 4), r % 4, c % 4] if c < 7 else [-1, -1, -1] for r in range(8) for c in range(1, 8)
    ]
    assert places[16:] == tiles


@pytest.mark.parametrize("size", [(2, 2), (2, 1.5), (1, 3)])
def test_places_where_tiles_are_resized_together(models, size):
    """Between two tiles a token lies in the one that it is made of most, never in a third."""
    s = Seen(models("llava_onevision"), "llava_onevision", ((size,),))
    picture = s.drawn[0]
    place = s.encoder.places()[16:].view(picture.ends, -1, 3)
    assert (place[:, -1] == -1).all()
    view, row, column = place[:, :-1].unbind(-1)
    across = math.ceil(size[1])
    sides = [round(4 * x) for x in size]  # patches of the picture
    cut = (4 * across - sides[1]) // 2  # of the tiles, on both sides
    assert view.shape[0] < sides[0] and view.shape[1] < sides[1]
    have = (view - 1) // across * 4 + row, (view - 1) % across * 4 + column - cut
    for i, (at, side) in enumerate(zip(have, sides, strict=True)):
        new = view.shape[i]
        middle = ((torch.arange(new) + 0.5) * side / new - 0.5).unflatten(0, (-1, 1) if i == 0 else (1, -1))
        assert (at - middle).abs().max() <= 0.5 + 1e-4


def test_windows_that_nothing_tells_apart_are_refused(models):
    """Flash attention gets all windows of all images as one row; a method that reads no attention does not mind."""
    model = models.fresh("qwen2_5_vl")
    model.model.visual.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"windows.*uses 'flash_attention_2'"), kr.mllm.FoPru()(model):
        pass
    assert model.model.visual.config._attn_implementation == "flash_attention_2"
    with kr.mllm.DivPrune()(model):
        pass
    with kr.mllm.FoPru()(models("qwen2_5_vl")):
        pass


@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
def test_the_layer_of_the_features_is_the_models_own(models, name):
    model, batch = models(name), inputs(name, (((1, 1),),), (12,))
    method = kr.mllm.FasterVLM(keep=0.5)
    with torch.no_grad(), pytest.raises(ValueError, match=r"vision_feature_layer.*got -4"), method(model):
        model(**batch, vision_feature_layer=-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_attention_is_that_of_the_encoder(seen, models, name):
    """Class attention, attention received and keys of every block, against the eager encoder's own matrices."""
    s = seen(name)
    parts, encoder = s.parts, s.encoder
    for layer in range(len(parts.tower_layers)):
        views = encoder.views[layer]
        probs = [(v.q.float() @ v.k.float().transpose(2, 3) * v.scaling).softmax(-1) for v in views]
        if name != "qwen2_5_vl":
            eager = multimodal(models(name, attention="eager")).tower
            with torch.no_grad():
                pixels = s.batch["pixel_values"]
                if pixels.dim() == 5:
                    order = [(i, j) for i, p in enumerate(s.drawn) for j in range(_tiles(p, s))]
                    pixels = torch.stack([pixels[i, j] for i, j in order])
                own = eager(pixels, output_attentions=True).attentions[layer]
            torch.testing.assert_close(own, torch.cat(probs), rtol=1e-4, atol=1e-5)
        prefix = parts.prefix
        column = [p[..., prefix:].sum(2) for p in probs]  # b h n
        column = torch.cat(column, 2) if name == "qwen2_5_vl" else torch.cat(column)
        column = column / _rows(s)
        torch.testing.assert_close(encoder.received(layer), encoder.tokens(column.transpose(1, 2)), equal_nan=True)
        assert encoder.received(layer).shape == (len(s.features), parts.tower_attention[0].num_heads)
        if parts.has_cls:
            row = torch.cat(probs)[:, :, 0, prefix:].transpose(1, 2)
            torch.testing.assert_close(encoder.class_attention(layer), encoder.tokens(row), equal_nan=True)
        else:
            with pytest.raises(ValueError, match="no class token"):
                encoder.class_attention(layer)
        keys = encoder.keys(layer)
        assert keys.shape[:2] == (len(s.features), parts.tower_attention[0].num_heads)


def _tiles(picture, s) -> int:
    """Tiles of an AnyRes picture, the overview included."""
    return len(picture.data["pixel_values"][0])


def _rows(s) -> torch.Tensor:
    """Query rows of every patch's picture: what lies outside a window pays nothing."""
    if s.name != "qwen2_5_vl":
        return torch.tensor(s.encoder.views[0][0].q.shape[2])
    rows = s.batch["image_grid_thw"].prod(1)
    return rows.repeat_interleave(rows)


def test_a_small_window_at_the_border_is_no_advantage(models):
    """Where every patch looks at all of its window alike, all receive alike, wherever windows are cut."""
    s = Seen(models("qwen2_5_vl"), "qwen2_5_vl", (((1.25, 1.25),), ((1, 1.5),)))
    views = s.encoder.views[0]
    assert len({view.q.shape[2] for view in views}) > 1  # 5 x 5 tokens in windows of 2 x 2
    s.encoder.views[0] = [replace(view, q=torch.zeros_like(view.q)) for view in views]
    received, lengths = s.encoder.received(0), s.encoder.lengths
    want = torch.repeat_interleave(1 / (4 * torch.tensor(lengths)), torch.tensor(lengths))
    torch.testing.assert_close(received, want[:, None].expand_as(received))


@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
def test_features_must_be_those_of_the_patches(models, name):
    """With the class token among the visual tokens, or without the first patch, scores would stand at other tokens."""
    model, batch = models(name), inputs(name, (((1, 1),),), (12,))
    wrong = "full" if name == "llava" else "default"
    method, refused = kr.mllm.RandomVisual(keep=0.5), f"vision_feature_select_strategy.*got '{wrong}'"
    with torch.no_grad(), pytest.raises(ValueError, match=refused), method(model):
        model(**batch, vision_feature_select_strategy=wrong)
    with torch.no_grad(), method(model):
        model(**batch)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_scores_reach_the_method_picture_by_picture(models, name):
    """A method's tokens are those of its own picture, in every sample of a padded batch."""
    model, batch = models(name), inputs(name, IMAGES, (12, 16))
    caught = []

    class Look(kr.mllm.FasterVLM):
        def before(self, t):  # the encoder is forgotten when the block ends
            caught.append((t.total, t.x, t.valid, t.received(t.parts.feature)))

    with torch.no_grad(), Look(keep=0.5)(model):
        model(**batch)
    ((total, x, valid, received),) = caught
    drawn = [p for sample in pictures(name, IMAGES) for p in sample]
    assert total.tolist() == [(p.tokens - p.ends) // p.views for p in drawn for _ in range(p.views)]
    s = Seen(model, name)
    there = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(x[there], s.features[~s.encoder.line_ends()], rtol=1e-4, atol=1e-5)
    want = s.encoder.received(s.parts.feature)[~s.encoder.line_ends()]
    received = received.transpose(1, 2)
    torch.testing.assert_close(received[there], want, rtol=1e-4, atol=1e-6)
    assert (received[~there] == 0).all()
