"""Models load by name through one path, and a bad name or a damaged file says what is wrong."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
import transformers as tf

from keeprate.models import load, models

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
BUILD = {
    "ViTForImageClassification": lambda: tf.ViTConfig(**SIZES),
    "DeiTForImageClassification": lambda: tf.DeiTConfig(**SIZES),
    "Dinov2ForImageClassification": lambda: tf.Dinov2Config(**DINO),
    "Dinov2WithRegistersForImageClassification": lambda: tf.Dinov2WithRegistersConfig(**DINO),
    "CLIPForImageClassification": lambda: tf.CLIPConfig(text_config=TEXT, vision_config=SIZES),
    "SiglipForImageClassification": lambda: tf.SiglipConfig(text_config=TEXT, vision_config=SIZES),
}


def save(folder, cls="ViTForImageClassification"):
    """A tiny checkpoint of a class with its processor; returns the model."""
    torch.manual_seed(0)
    model = getattr(tf, cls)(BUILD[cls]()).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A project with one embedded model, `tiny`."""
    folder = tmp_path / "data" / "models" / "tiny"
    folder.mkdir(parents=True)
    model = save(folder)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    card = {"task": "vit-digits", "accuracy": {"value": 0.5, "n": 4}, "sha256": digests}
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr("keeprate.project.root", lambda: tmp_path)
    return folder, model


@pytest.mark.parametrize("cls", BUILD)
def test_folder_of_every_class_loads_equal(tmp_path, cls, recwarn, capfd):
    model = save(tmp_path, cls)
    capfd.readouterr()
    loaded = load(str(tmp_path))
    assert type(loaded.model) is getattr(tf, cls) and not loaded.model.training
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    pixels = loaded.processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(loaded.model(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    assert loaded.task is None and loaded.card == {}
    assert len(repr(loaded)) < 250 and cls in repr(loaded)
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_dtype(tmp_path):
    save(tmp_path)
    assert {p.dtype for p in load(str(tmp_path), dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_text_model_brings_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 3, "?": 4}, "?"))).save_pretrained(
        tmp_path
    )
    loaded = load(str(tmp_path))
    assert type(loaded.model) is tf.LlamaForCausalLM and loaded.processor("a").input_ids == [3]


def save_qwen(folder):
    """A tiny Qwen2.5-VL as on the hub: its processor has a part for videos, which needs torchvision."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "?", *marks])}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", extra_special_tokens=marks)
    tokenizer.save_pretrained(folder)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=TEXT | {"num_key_value_heads": 2, "rope_parameters": rope},
        **{f"{n}_token_id": i for i, n in enumerate(("vision_start", "vision_end", "image", "video"), 4)},
    )
    tf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 1024, "max_pixels": 1024}
    about = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(about | pixels))


def test_processor_without_torchvision_takes_images(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(sys.modules[load.__module__], "is_torchvision_available", lambda: False)
    save_qwen(tmp_path / "hub")
    loaded = load(str(tmp_path / "hub"))
    assert type(loaded.processor).__name__ == "Qwen2_5_VLProcessor"
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    prompt = "? <|vision_start|><|image_pad|><|vision_end|> ?"
    made = loaded.processor(images=[image], text=[prompt], return_tensors="pt")
    tokens = int((made["input_ids"] == loaded.model.config.image_token_id).sum())
    assert tokens == int(made["image_grid_thw"].prod()) // 4 and tokens > 1
    loaded.processor.save_pretrained(tmp_path / "again")  # a fine-tuned model goes to disk with its processor
    loaded.model.save_pretrained(tmp_path / "again")
    again = load(str(tmp_path / "again")).processor(images=[image], text=[prompt], return_tensors="pt")
    assert torch.equal(again["pixel_values"], made["pixel_values"])
    assert not [w for w in recwarn.list if "torchvision" in str(w.message).lower()]


def test_processor_that_lacks_a_package_says_so(tmp_path, monkeypatch):
    save(tmp_path)

    def missing(*args, **kwargs):
        raise ImportError("this processor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", missing)
    with pytest.raises(ValueError, match=r"folder .* could not be loaded: .*requires the Torchvision"):
        load(str(tmp_path))


def test_embedded_name_card_and_table(embedded):
    folder, model = embedded
    loaded = load("tiny")
    assert loaded.task == "vit-digits" and loaded.card["accuracy"]["n"] == 4
    row = models().iloc[0]
    assert list(models().columns) == ["name", "class", "parameters", "accuracy", "size MB", "task"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters()) and row["accuracy"] == 0.5
    assert row["size MB"] == pytest.approx(sum(f.stat().st_size for f in folder.iterdir()) / 1e6)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_damaged_file_is_named(embedded, file):
    path = embedded[0] / file
    expected, content = hashlib.sha256(path.read_bytes()).hexdigest(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{expected}.*{hashlib.sha256(content).hexdigest()}"):
        load("tiny")


def test_missing_file_is_named(embedded):
    (embedded[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors.*no such file"):
        load("tiny")


@pytest.mark.parametrize("name", ["tinny", "./nowhere", "/no/such/folder", "a/b/c", ""])
def test_unknown_name_lists_what_is_allowed(embedded, name):
    with pytest.raises(ValueError, match=r"no model called.*\(tiny\).*save_pretrained.*org/name"):
        load(name)


def test_unreachable_hub(embedded, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hub id 'nobody/nothing'.*could not be loaded"):
        load("nobody/nothing")


def test_pickled_weights_are_refused(tmp_path):
    model = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load(str(tmp_path))


def test_checkpoint_without_the_head_is_refused(tmp_path):
    save(tmp_path)
    tf.ViTModel(BUILD["ViTForImageClassification"](), add_pooling_layer=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(ValueError, match=r"lacks 2 weights of ViTForImageClassification, such as classifier\.bias"):
        load(str(tmp_path))


def test_checkpoint_without_processor_says_so(tmp_path):
    save(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config"):
        load(str(tmp_path))
