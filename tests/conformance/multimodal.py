"""Tiny multimodal checkpoints, and prompts for them made without a processor or a tokenizer.

A picture's size is given in sides of the vision tower's input, (rows, columns): (1, 1) is one tile, (1, 2) two abreast.
What it becomes is the class's own business: always one tile (LLaVA), tiles beside an overview (LLaVA-NeXT, OneVision,
InternVL), a larger grid (Qwen2.5-VL), or tiles for cross-attention (Mllama).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from .checkpoints import VOCABULARY, pixels, save

Size = tuple[float, float]

LAYERS, PATCH = 6, 4
PAD, BOS, IMAGE, VIDEO, START, END, FIRST = 0, 1, 3, 4, 5, 6, 10  # ids below FIRST mean something; text begins there

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_TILED = {"image_size": 4 * PATCH, "patch_size": PATCH}  # 16 patches a tile
_SPECIAL = {"image_token_index": IMAGE, "tie_word_embeddings": False}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]


def _llava(tower: Any, text: Any, **more: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=tower, text_config=text, image_seq_length=36, **_SPECIAL, **more)


# checkpoint -> (architecture as the library names it, class, configuration)
MULTIMODAL: dict[str, tuple[str, type, Callable[[], Any]]] = {
    "llava": (
        "llava",
        LlavaForConditionalGeneration,
        lambda: _llava(CLIPVisionConfig(**_VISION, image_size=24, patch_size=PATCH), LlamaConfig(**_TEXT)),
    ),
    "llava-siglip": (  # no class token, the features of two layers side by side
        "llava",
        LlavaForConditionalGeneration,
        lambda: _llava(
            SiglipVisionConfig(**_VISION, image_size=24, patch_size=PATCH, vision_use_head=False),
            Qwen2Config(**_TEXT),
            vision_feature_layer=[-3, -1],
            vision_feature_select_strategy="full",
        ),
    ),
    "llava_next": (
        "llava_next",
        LlavaNextForConditionalGeneration,
        lambda: LlavaNextConfig(
            vision_config=CLIPVisionConfig(**_VISION, **_TILED),
            text_config=LlamaConfig(**_TEXT),
            image_grid_pinpoints=_PINPOINTS,
            image_seq_length=16,
            **_SPECIAL,
        ),
    ),
    "llava_onevision": (  # at most twice the overview's tokens: beyond, features are interpolated
        "llava_onevision",
        LlavaOnevisionForConditionalGeneration,
        lambda: LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**_VISION, **_TILED, vision_use_head=False),
            text_config=Qwen2Config(**_TEXT),
            image_grid_pinpoints=[[16, 16], *_PINPOINTS],
            vision_aspect_ratio="anyres_max_2",
            video_token_index=VIDEO,
            **_SPECIAL,
        ),
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        Qwen2_5_VLForConditionalGeneration,
        lambda: Qwen2_5_VLConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": PATCH,
                "window_size": 4 * PATCH,
                "out_hidden_size": _TEXT["hidden_size"],
                "fullatt_block_indexes": [1, 3],
            },
            text_config={**_TEXT, "rope_parameters": _MROPE},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        ),
    ),
    "internvl": (
        "internvl",
        InternVLForConditionalGeneration,
        lambda: InternVLConfig(
            vision_config=InternVLVisionConfig(**_VISION, image_size=8 * PATCH, patch_size=PATCH),
            text_config=Qwen2Config(**_TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=False,
        ),
    ),
    "mllama": (
        "mllama",
        MllamaForConditionalGeneration,
        lambda: MllamaConfig(
            vision_config=MllamaVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_global_layers=1,
                attention_heads=4,
                vision_output_dim=3 * 32,
                intermediate_layers_indices=[0, 1],
                **_TILED,
            ),
            text_config=MllamaTextConfig(**_TEXT, cross_attention_layers=[1, 4]),
            image_token_index=VOCABULARY,  # beyond what the model can say, as in the published checkpoints
        ),
    ),
}


class Models:
    """The checkpoints, each built and saved once, and loaded once per dtype and attention implementation."""

    def __init__(self, folder: Path):
        self.folder, self.paths, self.models = folder, {}, {}

    def path(self, name: str) -> Path:
        """Folder of a checkpoint."""
        if name not in self.paths:
            self.paths[name] = save(name, self.folder, MULTIMODAL, mute=FIRST)
        return self.paths[name]

    def fresh(self, name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
        """A model that nobody else holds."""
        cls = MULTIMODAL[name][1]
        return cls.from_pretrained(self.path(name), dtype=dtype, attn_implementation=attention).eval()

    def __call__(self, name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
        """The session's model."""
        key = (name, dtype, attention)
        if key not in self.models:
            self.models[key] = self.fresh(*key)
        return self.models[key]


_configs: dict[str, Any] = {}


def config(name: str) -> Any:
    """The checkpoint's configuration."""
    if name not in _configs:
        _configs[name] = MULTIMODAL[name][2]()
    return _configs[name]


def image_token(name: str) -> int:
    """Id of the placeholder of a visual token; Mllama has one for a whole picture."""
    return VOCABULARY if name == "mllama" else IMAGE


# --- one picture ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One picture as a prompt needs it.

    Attributes:
        tokens: Placeholders in the prompt.
        ends: How many of them end a line of patches and show none.
        views: Images that the vision encoder's features are handed over as (InternVL: one a tile).
        data: What goes into the batch.
    """

    tokens: int
    data: dict[str, torch.Tensor]
    ends: int = 0
    views: int = 1


def _cut(picture: torch.Tensor, side: int) -> torch.Tensor:
    """[3, r * side, c * side] -> [r * c, 3, side, side]."""
    return picture.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _draw(rows: int, columns: int, side: int, seed: int) -> torch.Tensor:
    """[3, rows * side, columns * side]."""
    return pixels(1, seed, (rows * side, columns * side))[0]


def _overview(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The whole picture in one tile, [1, 3, side, side]."""
    return torch.nn.functional.interpolate(picture[None], size=(side, side), mode="bilinear", antialias=True)


def _one_tile(name: str, size: Size, seed: int, alone: bool) -> Picture:
    vision = config(name).vision_config
    tile = _draw(1, 1, vision.image_size, seed)[None]
    return Picture((vision.image_size // vision.patch_size) ** 2, {"pixel_values": tile})


def _any_resolution(name: str, size: Size, seed: int, alone: bool) -> Picture:
    settings = config(name)
    side = settings.vision_config.image_size
    grid = side // settings.vision_config.patch_size
    original = [round(s * side) for s in size]
    found = {"image_sizes": torch.tensor([original])}
    if name == "llava_onevision" and not alone:  # several pictures in one prompt are not cut into tiles
        return Picture(grid**2 + 1, {"pixel_values": _draw(1, 1, side, seed)[None, None], **found}, ends=1)
    rows, columns = (s // side for s in select_best_resolution(original, settings.image_grid_pinpoints))
    picture = _draw(rows, columns, side, seed)
    found["pixel_values"] = torch.cat([_overview(picture, side), _cut(picture, side)])[None]
    height, width = unpad_image(torch.empty(1, rows * grid, columns * grid), original).shape[1:]
    if name == "llava_onevision":
        most = int(settings.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * grid**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return Picture(grid**2 + height * (width + 1), found, ends=height)


def _grid(name: str, size: Size, seed: int, alone: bool) -> Picture:
    vision = config(name).vision_config
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = (round(s * 4) for s in size)  # after merging
    picture = _draw(rows, columns, m * p, seed).view(3, rows, m, p, columns, m, p).permute(1, 4, 2, 5, 0, 3, 6)
    patches = picture[..., None, :, :].expand(*picture.shape[:5], t, p, p).reshape(rows * columns * m * m, -1)
    grid = torch.tensor([[1, rows * m, columns * m]])
    return Picture(rows * columns, {"pixel_values": patches, "image_grid_thw": grid})


def _shuffled(name: str, size: Size, seed: int, alone: bool) -> Picture:
    side = config(name).vision_config.image_size[0]
    picture = _draw(*map(math.ceil, size), side, seed)
    tiles = _cut(picture, side)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, _overview(picture, side)])
    return Picture(len(tiles) * config(name).image_seq_length, {"pixel_values": tiles}, views=len(tiles))


def _cross(name: str, size: Size, seed: int, alone: bool) -> Picture:
    vision = config(name).vision_config
    rows, columns = map(math.ceil, size)
    tiles = _cut(_draw(rows, columns, vision.image_size, seed), vision.image_size)
    missing = vision.max_num_tiles - len(tiles)
    data = {
        "pixel_values": torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, missing))[None],
        "aspect_ratio_ids": torch.tensor([vision.supported_aspect_ratios.index([rows, columns]) + 1]),
        "aspect_ratio_mask": (torch.arange(vision.max_num_tiles) < len(tiles)).long()[None],
    }
    return Picture(1, data, views=len(tiles))


_PICTURE = {
    "llava": _one_tile,
    "llava-siglip": _one_tile,
    "llava_next": _any_resolution,
    "llava_onevision": _any_resolution,
    "qwen2_5_vl": _grid,
    "internvl": _shuffled,
    "mllama": _cross,
}


# --- a batch ----------------------------------------------------------------------------------------------------------


def pictures(name: str, images: Sequence[Sequence[Size]], seed: int = 0) -> list[list[Picture]]:
    """Every picture of every sample."""
    return [
        [_PICTURE[name](name, size, 100 * (seed + i) + j, len(sizes) == 1) for j, size in enumerate(sizes)]
        for i, sizes in enumerate(images)
    ]


def counts(name: str, images: Sequence[Sequence[Size]]) -> list[list[int]]:
    """Placeholders of every picture of every sample."""
    return [[picture.tokens for picture in sample] for sample in pictures(name, images)]


def inputs(
    name: str,
    images: Sequence[Sequence[Size]] = (((1, 1),),),
    text_lengths: Sequence[int] | None = None,
    padding: str = "left",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model's forward pass and of generate.

    Sample i is decided by its pictures, its text length and seed + i: `inputs(name, images[i : i + 1],
    text_lengths[i : i + 1], seed=seed + i)` is that sample alone.

    Args:
        name: Checkpoint.
        images: For every sample the sizes of its pictures in tiles (rows, columns); an empty one has text only.
        text_lengths: Text tokens of every sample, the beginning-of-sequence token included; 12 each when None.
        padding: Side on which short samples are padded.
        seed: Decides ids and pixels.

    Returns:
        input_ids and attention_mask [b, n]; when there are pictures, pixel_values and what else the class wants.
    """
    lengths = [12] * len(images) if text_lengths is None else text_lengths
    drawn = pictures(name, images, seed)
    prompts = [
        _prompt(name, [p.tokens for p in sample], length, seed + i)
        for i, (sample, length) in enumerate(zip(drawn, lengths, strict=True))
    ]
    data = [[p.data for p in sample] for sample in drawn]
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), None) if padding == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    made = {"input_ids": ids, "attention_mask": mask}
    if name == "qwen2_5_vl":
        made["mm_token_type_ids"] = (ids == IMAGE).int()
    if any(data):
        made |= _mllama(data, ids, mask) if name == "mllama" else _join(data)
        if name == "llava_onevision":
            made["batch_num_images"] = torch.tensor([len(sample) for sample in data])
    return made


def _prompt(name: str, visual: list[int], length: int, seed: int) -> torch.Tensor:
    """Text with pictures in it: three tokens before the first, two between, the rest behind the last."""
    text = torch.randint(FIRST, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    text[0] = BOS
    # Mllama: a token before any picture would attend to the padding that stands in for pictures of other samples
    heads = [0] if name == "mllama" else [3]
    heads += [2] * (len(visual) - 1) if visual else []
    if sum(heads) + 2 > length:
        raise ValueError(f"{len(visual)} pictures need at least {sum(heads) + 2} text tokens; got {length}")
    parts: list[torch.Tensor] = []
    start = 0
    for n, head in zip(visual, heads, strict=False):
        picture = torch.full((n,), image_token(name))
        if name == "qwen2_5_vl":
            picture = torch.cat([torch.tensor([START]), picture, torch.tensor([END])])
        parts += [text[start : start + head], picture]
        start += head
    return torch.cat([*parts, text[start:]])


def _join(samples: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """All pictures of all samples in one row; tiles of AnyRes are padded to the most that one picture has."""
    flat = [data for sample in samples for data in sample]
    joined = {}
    for key in flat[0]:
        tensors = [data[key] for data in flat]
        if tensors[0].dim() == 5:
            most = max(t.shape[1] for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0,) * 7 + (most - t.shape[1],)) for t in tensors]
        joined[key] = torch.cat(tensors)
    return joined


def _mllama(
    samples: list[list[dict[str, torch.Tensor]]], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Pictures by sample, and which of them each token sees: the latest one before it."""
    most = max(map(len, samples))
    blank = {key: torch.zeros_like(value) for key, value in next(s for s in samples if s)[0].items()}
    rows = [[*sample, *[blank] * (most - len(sample))] for sample in samples]
    made = {key: torch.stack([torch.cat([data[key] for data in row]) for row in rows]) for key in blank}
    order = (ids == VOCABULARY).cumsum(1) * mask  # number of the latest picture, 1-based
    sees = order[..., None] == torch.arange(1, most + 1)
    tiles = made["aspect_ratio_mask"].bool()
    made["cross_attention_mask"] = (sees[..., None] & tiles[:, None]).long()
    return made
