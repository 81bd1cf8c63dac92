"""The digits task and the interface that every image task has."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from keeprate.tasks import digits, task
from keeprate.train.common import PROCESSOR


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Stands for a loaded model: only its processor is used."""
    from transformers import AutoImageProcessor

    folder = tmp_path_factory.mktemp("processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return SimpleNamespace(processor=AutoImageProcessor.from_pretrained(folder))


def test_same_seed_same_images():
    first, again, other = (digits.render(rng(seed), 8, "test") for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.truth, again.truth)
    assert not torch.equal(first.pixels, other.pixels)


def test_splits_share_no_writer_and_no_part_of_a_photograph():
    (train, _), (test, labels) = digits.glyphs("train"), digits.glyphs("test")
    assert len(train) + len(test) == 1797
    assert set(labels.tolist()) == set(range(10))
    assert not {ink.numpy().tobytes() for ink in train} & {ink.numpy().tobytes() for ink in test}
    for seen, held_out in zip(digits.photographs("train", (1.0,)), digits.photographs("test", (1.0,)), strict=True):
        axis = 0 if seen.shape[1] == held_out.shape[1] else 1
        lines = {line.tobytes() for line in np.moveaxis(seen, axis, 0)}
        assert not any(line.tobytes() in lines for line in np.moveaxis(held_out, axis, 0) if line.std() > 0)


def test_truth_marks_the_patches_that_the_paste_changed():
    ink, _ = digits.glyphs("test")
    centre, height = torch.tensor([[20.0, 30.0], [40.0, 15.0]]), torch.tensor([14.0, 22.0])
    alpha = digits.draw_glyphs(ink[:2], centre, height, (56, 56))
    background = torch.full((2, 3, 56, 56), 0.2)
    pasted = digits.paste(background, alpha, torch.ones(2, 3), torch.full((2,), 0.5))
    changed = (pasted - background).abs().amax(1)
    truth = digits.covered_patches(alpha)
    assert torch.equal(truth, F.avg_pool2d(changed[:, None] / 0.5, 4)[:, 0] >= digits.INK)
    assert changed[~truth.repeat_interleave(4, 1).repeat_interleave(4, 2)].mean() < 0.01
    middle = (alpha * torch.arange(56.0)[:, None]).sum((1, 2)) / alpha.sum((1, 2))
    assert (middle - centre[:, 0]).abs().max() < 4  # the ink of a digit is not centred in its box


def test_every_digit_is_whole_and_spans_a_few_patches():
    truth = digits.render(rng(), 256, "train").truth
    per_image = truth.flatten(1).sum(1)
    assert per_image.min() >= 3
    assert per_image.max() <= 30
    assert 8 <= per_image.float().mean() <= 16
    assert truth.any(2).sum(1).max() <= 7
    assert truth.any(1).sum(1).max() <= 7


def test_digit_is_brighter_than_what_surrounds_it():
    ink, _ = digits.glyphs("train")
    alpha = digits.draw_glyphs(ink[:64], torch.full((64, 2), 28.0), torch.full((64,), 20.0), (56, 56))
    background = digits.crop_photographs(rng(), 64, 56, 56, "train")
    hue = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    pasted = digits.paste(background, alpha, hue, torch.full((64,), 0.4))
    luma = torch.einsum("nchw,c->nhw", pasted, torch.tensor([0.299, 0.587, 0.114]))
    beside = (F.max_pool2d(alpha[:, None], 5, 1, 2)[:, 0] > 0.5) & (alpha == 0)
    for value, ink_here, rim in zip(luma, alpha == 1, beside, strict=True):
        assert value[ink_here].mean() - value[rim].mean() > 0.2


@pytest.mark.parametrize("bad", [{"n": 0}, {"side": 5}, {"clutter": 1.5}, {"split": "validation"}])
def test_render_refuses(bad):
    with pytest.raises(ValueError, match="allowed"):
        digits.render(rng(), **{"n": 1, "split": "train"} | bad)


def test_embedded_task(loaded):
    sample = task("vit-digits", split="test", n=12, seed=1)
    assert (sample.name, sample.split, len(sample), len(sample.classes)) == ("vit-digits", "test", 12, 10)
    assert sample.data[0]["image"].size == (56, 56)
    assert sample.data.features["label"].int2str(3) == "three"
    assert np.array(sample.data[0]["truth"]).shape == (14, 14)
    assert sample.truth.shape == (12, 196)
    assert sample.truth.dtype == torch.bool
    parts = list(sample.batches(loaded, batch_size=5))
    assert [len(part["labels"]) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), sample.labels)
    assert torch.equal(torch.cat([part["truth"] for part in parts]), sample.truth)
    pixels = parts[0]["pixel_values"]
    assert pixels.shape == (5, 3, 56, 56)
    expected = torch.from_numpy(np.array(sample.data[0]["image"])).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)
    again = task("vit-digits", n=12, seed=1)
    assert torch.equal(again.truth, sample.truth)
    assert torch.equal(next(again.batches(loaded, 5))["pixel_values"], pixels)
    with pytest.raises(ValueError, match="batch_size"):
        next(sample.batches(loaded, batch_size=0))


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": -3}, {"split": "validation"}])
def test_task_refuses(bad):
    with pytest.raises(ValueError, match="allowed"):
        task("vit-digits", **bad)


def test_unknown_name_says_what_is_allowed(monkeypatch):
    import datasets

    def offline(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="'vit-digit' is unknown; allowed: 'vit-digits', a folder"):
        task("vit-digit")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, per_class in (("train", 4), ("test", 3)):
        for label, shade in (("ant", 40), ("bee", 200)):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            Image.new("L", (56, 56), shade).save(place / "grey.png")
            for i in range(1, per_class):
                Image.new("RGB", (56, 56), (shade, i, 0)).save(place / f"{i}.png")
    return str(tmp_path / "images")


def test_folder_of_images_has_the_same_interface(folder, loaded):
    sample = task(folder, split="test", n=6)
    assert sample.classes == ("ant", "bee")
    assert sample.truth is None
    assert sorted(sample.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    (part,) = sample.batches(loaded)
    assert part["truth"] is None
    assert part["pixel_values"].shape == (6, 3, 56, 56)
    assert torch.equal(part["pixel_values"][:, 0].mean((1, 2)) > 0, part["labels"] == 1)
    orders = [tuple(task(folder, split="train", n=8, seed=seed).labels.tolist()) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len(set(orders)) > 1
    with pytest.raises(ValueError, match=r"split='dev' .* allowed: 'train', 'test'"):
        task(folder, split="dev", n=1)
    with pytest.raises(ValueError, match="n=7; allowed: 1 to 6"):
        task(folder, split="test", n=7)


def test_hub_data_set_is_streamed_and_shuffled(monkeypatch, loaded):
    import datasets

    names = datasets.ClassLabel(names=["ant", "bee"])
    features = datasets.Features(img=datasets.Image(), label=names, id=datasets.Value("int32"))
    images = [Image.new("RGB", (56, 56), (i, 0, 0)) for i in range(20)]
    rows = {"img": images, "label": [i % 2 for i in range(20)], "id": list(range(20))}
    hub = datasets.Dataset.from_dict(rows, features=features)
    unlabelled = datasets.Dataset.from_dict(rows | {"label": [-1] * 20}, features=features)
    asked = {}

    def load(**source):
        asked.update(source)
        return {"train": hub.to_iterable_dataset(), "test": unlabelled.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    sample = task("someone/insects", split="train", n=8, seed=2)
    assert asked == {"path": "someone/insects", "streaming": True}
    assert sample.data.column_names == ["image", "label"]
    assert sample.truth is None
    reds = [image.getpixel((0, 0))[0] for image in sample.data["image"]]
    assert len(set(reds)) == 8
    assert reds != sorted(reds)
    assert sample.labels.tolist() == [red % 2 for red in reds]
    assert len(next(sample.batches(loaded))["labels"]) == 8
    with pytest.raises(ValueError, match="n=21; allowed: 1 to 20"):
        task("someone/insects", split="train", n=21)
    with pytest.raises(ValueError, match="no labels"):
        task("someone/insects", split="test", n=4)
