"""The paper tiers of the multimodal notebooks: a LLaVA, a CLIP and a data set that the project never saw."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SIDE, PATCH = 64, 8


def save_models(root: Path, folder: Path) -> None:
    """A LLaVA as on the hub, but tiny and untrained, with 64 visual tokens, and the CLIP model its encoder is from."""
    processor = AutoProcessor.from_pretrained(root / "data" / "models" / "llava-digits")
    pixels = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor.image_processor.size, processor.image_processor.crop_size = pixels
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | ends
    inside = {"intermediate_size": 48, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": PATCH} | inside
    text = {"hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64} | inside | shared
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    clip.save_pretrained(folder / "clip")
    CLIPProcessor(processor.image_processor, tokenizer).save_pretrained(folder / "clip")
    body = LlamaConfig(
        hidden_size=32, num_hidden_layers=8, num_key_value_heads=1, initializer_range=0.2, **inside, **shared
    )
    made = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=body,
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    llava = LlavaForConditionalGeneration(made)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=False)
    llava.generation_config.update(**shared)
    llava.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")


def save_questions(folder: Path, n: int = 12) -> None:
    """Questions in the columns of POPE, about pictures of any size."""
    rng = np.random.default_rng(0)
    columns = {
        "question": [f"Is there a {('cat', 'cup', 'rocket')[i % 3]} in the image?" for i in range(n)],
        "answer": ["yes" if i % 2 else "no" for i in range(n)],
        "category": [("random", "popular", "adversarial")[i // 2 % 3] for i in range(n)],
        "image": [Image.fromarray(rng.integers(0, 255, (48 + 4 * i, 60, 3), dtype=np.uint8)) for i in range(n)],
    }
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": data}).save_to_disk(str(folder))


@pytest.mark.parametrize(
    ("notebook", "small", "pictures", "absent"),
    [
        (
            "20_mllm_before_llm",
            {"n": 8, "keeps": [0.125, 0.5], "batch_size": 4},
            {"accuracy", "budgets", "questions", "cost", "claims"},
            {"found", "salience"},
        ),
        (
            "21_mllm_inside_llm",
            {"n": 6, "means": [0.4, 0.7], "batch_size": 3, "repeats": 1},
            {"scores_by_layer", "sweep", "overlays", "leaving", "cost", "claims"},
            set(),
        ),
    ],
)
def test_paper_tier_runs_on_any_model_and_data(
    notebook: str, small: dict, pictures: set, absent: set, paper_run: Callable, root: Path, tmp_path: Path
):
    save_models(root, tmp_path)
    save_questions(tmp_path / "pope")
    local = {"model": str(tmp_path / "llava"), "task": str(tmp_path / "pope")}
    if notebook.startswith("20"):
        local["clip"] = str(tmp_path / "clip")
    results, _ = paper_run(notebook, "mllm", **local, **small)
    assert pictures <= set(results["figures"])
    assert not absent & set(results["figures"]), "nobody knows which patches matter here"
