"""Training: it learns, it resumes where it was, and what it publishes can be checked."""

import json
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from keeprate.tasks import digits
from keeprate.train import common, siglip_digits, vit_digits
from keeprate.train.common import Recipe, Stage, Trainer

MODELS = Path(__file__).parents[1] / "data" / "models"
TINY = Recipe(
    (Stage(4, side=6, batch=4, depth=2, clutter=(0.0, 0.5)), Stage(4, side=7, batch=4, depth=4)), warmup=2, decay=0.5
)


def tiny_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(
        ViTConfig(**sizes, image_size=56, patch_size=4, num_labels=10, initializer_range=0.1)
    )
    nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.1)
    return model


def everywhere(n: int) -> torch.Tensor:
    return torch.arange(196).expand(n, -1)


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_forward_on_the_whole_grid_is_the_model():
    model = tiny_vit().eval()
    expected = model(pixels()).logits
    torch.testing.assert_close(vit_digits.forward(model, pixels(), everywhere(3), depth=4), expected)
    kept = vit_digits.forward(model, pixels(), everywhere(3), depth=4, keep=(1, everywhere(3)))
    torch.testing.assert_close(kept, expected)
    dropped = vit_digits.forward(model, pixels(), everywhere(3), depth=4, keep=(1, everywhere(3)[:, ::4]))
    assert not torch.allclose(dropped, expected, atol=1e-3)


def test_siglip_forward_is_the_model_and_takes_every_weight_of_the_vit():
    vit = tiny_vit()
    model = siglip_digits.build(vit).eval()
    torch.testing.assert_close(siglip_digits.forward(model, pixels(), everywhere(3)), model(pixels()).logits)
    count = sum(weight.numel() for weight in model.parameters())
    assert count == sum(weight.numel() for weight in vit.parameters()) - 2 * 16  # CLS and its position
    old, new = vit.vit.layers[3], model.vision_model.encoder.layers[3]
    x = pixels().flatten(2)[:, :, :160].reshape(3, 30, 16)
    torch.testing.assert_close(new(x, attention_mask=None), old(x), atol=2e-3, rtol=0)  # gelu and its tanh form


def test_window_gives_the_places_of_a_square():
    place = common.window(np.random.default_rng(0), 50, side=6)
    y, x = place // 14, place % 14
    assert place.shape == (50, 36)
    assert ((y - y[:, :1]) == torch.arange(36) // 6).all()
    assert ((x - x[:, :1]) == torch.arange(36) % 6).all()
    assert y.max() < 14
    assert len(place[:, 0].unique()) > 20
    assert torch.equal(common.window(np.random.default_rng(0), 2, side=14), everywhere(2))


def test_recipe_walks_through_its_stages():
    assert TINY.steps == 8
    assert [TINY.at(step)[0].side for step in range(8)] == [6] * 4 + [7] * 4
    assert [TINY.at(step)[1] for step in (0, 2, 4, 7)] == [0.0, 0.25, 1.0, 1.0]
    rates = [TINY.at(step)[2] / TINY.lr for step in range(8)]
    assert rates[:4] == [0.5, 1.0, 1.0, 1.0]
    assert all(later < sooner for sooner, later in pairwise(rates[4:]))


def test_training_reduces_the_loss_on_a_fixed_batch():
    recipe = replace(TINY, stages=(Stage(100, side=6, batch=16, depth=4),), warmup=1, lr=5e-3)
    batch = next(common.batches(recipe, 0))
    trainer = Trainer(tiny_vit(), vit_digits.forward, recipe)
    losses = [trainer.update(*batch)[0] for _ in range(40)]
    assert losses[1] < losses[0]
    assert losses[-1] < 0.5 * losses[0]


def test_batches_depend_on_seed_and_step_alone():
    whole, late = list(common.batches(TINY, 0)), list(common.batches(TINY, 5))
    assert (len(whole), len(late)) == (8, 3)
    for one, other in zip(whole[5:], late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    (other_seed,) = islice(common.batches(replace(TINY, seed=1), 0), 1)
    assert not torch.equal(other_seed[0], whole[0][0])


def test_an_interrupted_run_ends_in_the_same_state(tmp_path):
    through = Trainer(tiny_vit(), vit_digits.forward, TINY)
    through.run(tmp_path / "a" / "state.safetensors")
    first = Trainer(tiny_vit(), vit_digits.forward, TINY)
    first.run(tmp_path / "state.safetensors", until=3)
    second = Trainer(tiny_vit(seed=5), vit_digits.forward, TINY)
    second.run(tmp_path / "state.safetensors")
    assert (first.step, second.step, through.step) == (3, 8, 8)
    assert second.seconds > first.seconds
    for name, weight in through.named.items():
        assert torch.equal(weight, second.named[name])
        assert torch.equal(through.average[name], second.average[name])
        for key, value in through.optimizer.state[weight].items():
            assert torch.equal(value, second.optimizer.state[second.named[name]][key])
    with pytest.raises(ValueError, match="delete it to start anew"):
        Trainer(tiny_vit(), vit_digits.forward, replace(TINY, lr=1.0)).restore(tmp_path / "state.safetensors")


def test_published_folder_is_complete_and_checks(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = tiny_vit().eval()
    trainer = Trainer(model, vit_digits.forward, TINY)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "left-over").write_text("from an older model")
    card = common.publish(model, tmp_path / "m", TINY, trainer, {"name": "m"})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert card == json.loads((tmp_path / "m" / "card.json").read_text())
    assert {path.name for path in (tmp_path / "m").iterdir()} == {*card["sha256"], "card.json"}
    assert all(common.sha256(tmp_path / "m" / name) == value for name, value in card["sha256"].items())
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(again(pixels()).logits, model(pixels()).logits)
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "m").image_mean) == [0.5] * 3

    class Broken(nn.Module):
        def save_pretrained(self, folder):
            (Path(folder) / "half").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.publish(Broken(), tmp_path / "m", TINY, trainer, {"name": "m"})
    assert json.loads((tmp_path / "m" / "card.json").read_text()) == card
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["vit-digits", "siglip-digits"])
def test_embedded_model(name):
    from transformers import AutoModelForImageClassification

    folder = MODELS / name
    card = json.loads((folder / "card.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*card["sha256"], "card.json"}
    assert all(common.sha256(folder / file) == value for file, value in card["sha256"].items())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6.5e6
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert list(model.config.id2label.values()) == list(digits.CLASSES)
    assert card["params"] == sum(weight.numel() for weight in model.parameters())
    measured = common.accuracy(lambda batch: model(batch).logits, n=256)["value"]
    assert measured >= 0.9
    assert abs(measured - card["accuracy"]["value"]) < 0.06
    assert card["accuracy"]["value"] - card["random_drop_accuracy"]["value"] >= 0.08
