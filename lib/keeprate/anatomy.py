"""Where each supported architecture keeps its blocks, prefix tokens and pooling. The only file that knows.

A block is described by the names of its own submodules, so no forward pass is copied: the two halves below call the
same modules in the same order as transformers does, and a test proves the result bit-identical at keep=1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Block:
    """Names of a pre-norm block's submodules. Each tuple is applied in order."""

    norm1: str
    attention: str
    norm2: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    mlp: str = "mlp"

    def attend(self, layer: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """First half: x + attention(norm(x)). x: [b, n, d]."""
        y = getattr(layer, self.attention)(getattr(layer, self.norm1)(x), **kwargs)
        y = y[0] if isinstance(y, tuple) else y  # DINOv2 returns the bare tensor before transformers 5.23
        for name in self.after_attention:
            y = getattr(layer, name)(y)
        return y + x

    def feed(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Second half: x + mlp(norm(x)). x: [b, n, d]."""
        y = getattr(layer, self.mlp)(getattr(layer, self.norm2)(x))
        for name in self.after_mlp:
            y = getattr(layer, name)(y)
        return y + x


_VIT = Block("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))
_DINO = Block("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_CLIP = Block("layer_norm1", "self_attn", "layer_norm2")
DECODER_BLOCK = Block("input_layernorm", "self_attn", "post_attention_layernorm")  # of every decoder below


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: The name that `kr.methods()` and errors use.
        tower: Class name of the vision encoder inside the model.
        layer: Class name of its blocks.
        block: Their halves.
        prefix: Number of tokens before the patches, from the tower's config.
        has_cls: Whether token 0 is a class token.
        mean_pooled: Class name of the model whose head averages the patch tokens of the tower's output.
    """

    name: str
    tower: str
    layer: str
    block: Block
    prefix: Callable[[object], int]
    has_cls: bool = True
    mean_pooled: str = ""


_CLASSIFIER = "ForImageClassification"

ARCHITECTURES = (
    Architecture("vit", "ViTModel", "ViTLayer", _VIT, lambda c: 1),
    Architecture("deit", "DeiTModel", "DeiTLayer", _VIT, lambda c: 2),
    Architecture("dinov2", "Dinov2Model", "Dinov2Layer", _DINO, lambda c: 1, mean_pooled="Dinov2" + _CLASSIFIER),
    Architecture(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersLayer",
        _DINO,
        lambda c: 1 + c.num_register_tokens,
        mean_pooled="Dinov2WithRegisters" + _CLASSIFIER,
    ),
    Architecture("clip", "CLIPVisionModel", "CLIPEncoderLayer", _CLIP, lambda c: 1, mean_pooled="CLIP" + _CLASSIFIER),
    Architecture(
        "siglip",
        "SiglipVisionModel",
        "SiglipEncoderLayer",
        _CLIP,
        lambda c: 0,
        has_cls=False,
        mean_pooled="Siglip" + _CLASSIFIER,
    ),
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that token reduction needs.

    Attributes:
        name: Architecture name.
        tower: The vision encoder.
        layers: Its blocks in order.
        block: How to run a block in two halves.
        prefix: Number of protected tokens in front of the patches.
        has_cls: Whether token 0 is a class token.
        patches: The convolution that makes the patches, [b, d, rows, cols].
        grid: Rows and columns of patches at the configured image size.
        mean_pooled: Whether the head averages the patch tokens of the tower's output.
    """

    name: str
    tower: nn.Module
    layers: tuple[nn.Module, ...]
    block: Block
    prefix: int
    has_cls: bool
    patches: nn.Module
    grid: tuple[int, int]
    mean_pooled: bool

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention module of a block."""
        return getattr(layer, self.block.attention)


def _inside(given: Any) -> str:
    """A hint where the model is an attribute of what was given."""
    found = not isinstance(given, nn.Module) and isinstance(getattr(given, "model", None), nn.Module)
    return "; pass its .model" if found else ""


def supported() -> list[str]:
    """Names of the supported vision architectures."""
    return [a.name for a in ARCHITECTURES]


def anatomy(model: nn.Module) -> Anatomy:
    """Find the vision encoder of a model and describe it.

    Args:
        model: A vision tower, or a model with exactly one supported vision tower inside.

    Raises:
        ValueError: If the model has no supported tower; names what was given and what is supported.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> anatomy(ViTModel(ViTConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2))).grid
        (14, 14)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a transformers model; got {type(model).__name__}{_inside(model)}")
    towers = [(row, m) for row in ARCHITECTURES for m in model.modules() if type(m).__name__ == row.tower]
    if len(towers) != 1:
        found = "no supported vision encoder" if not towers else f"{len(towers)} vision encoders: pass one of them"
        raise ValueError(
            f"{type(model).__name__} holds {found}; supported are {', '.join(supported())} "
            f"({', '.join(a.tower for a in ARCHITECTURES)})"
        )
    row, tower = towers[0]
    return Anatomy(
        row.name,
        tower,
        tuple(m for m in tower.modules() if type(m).__name__ == row.layer),
        row.block,
        row.prefix(tower.config),
        row.has_cls,
        next(m for m in tower.modules() if isinstance(m, nn.Conv2d)),
        grid_of(tower.config),
        any(type(m).__name__ == row.mean_pooled for m in model.modules()),
    )


def grid_of(config) -> tuple[int, int]:
    """Rows and columns of patches from a vision config."""

    def pair(value) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    (height, width), (ph, pw) = pair(config.image_size), pair(config.patch_size)
    return height // ph, width // pw


def quarters(depth: int) -> tuple[int, ...]:
    """The field's default, after a quarter, half and three quarters of the blocks: 4, 7, 10 of 12 (1-based)."""
    return tuple(dict.fromkeys(math.floor(depth * q / 4) + 1 for q in (1, 2, 3)))


@dataclass(frozen=True)
class Decoder:
    """A causal language model as the KV-cache methods see it.

    Attributes:
        name: Architecture, as `kr.methods()` and errors call it.
        body: The stack of decoder layers: embeds, attends, keeps the cache.
        attention: Attention module of every layer.
        treated: Layers whose cache holds the whole context; the others have a sliding window and are left alone.
        heads, kv_heads, head_dim: Query heads, key/value heads (heads is a multiple), channels of a head.
    """

    name: str
    body: nn.Module
    attention: tuple[nn.Module, ...]
    treated: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    def rotary(self, positions: torch.Tensor, layer: int, dtype: torch.dtype = torch.float32):
        """Cosines and sines of the rotary embedding: positions [b, m] -> two tensors [b, m, d]."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        kinds = getattr(self.body.config, "layer_types", None)
        if self.name == "gemma3":  # its sliding and full layers rotate at different speeds
            return self.body.rotary_emb(like, positions, kinds[layer])
        return self.body.rotary_emb(like, positions)


DECODERS = {
    "LlamaModel": "llama",
    "MistralModel": "mistral",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
    "GemmaModel": "gemma",
    "Gemma3TextModel": "gemma3",
}


def decoder(model: nn.Module) -> Decoder:
    """The one language decoder inside a model.

    Raises:
        ValueError: If the model has none, or more than one, of a supported class, or no layer that caches everything.

    Example:
        >>> decoder(kr.load("llama-docs").model).kv_heads   # doctest: +SKIP
    """
    bodies = [m for m in model.modules() if type(m).__name__ in DECODERS] if isinstance(model, nn.Module) else []
    if len(bodies) != 1:
        found = ", ".join(type(b).__name__ for b in bodies) or "none"
        raise ValueError(
            f"{type(model).__name__} must hold exactly one decoder of a supported class ({', '.join(DECODERS)}); "
            f"found {found}{_inside(model)}"
        )
    body = bodies[0]
    config = body.config
    attention = tuple(layer.self_attn for layer in body.layers)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:  # Mistral says it once for all layers
        kinds = ["sliding_attention" if window else "full_attention"] * len(attention)
    treated = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    if not treated:
        raise ValueError(
            f"every layer of this {type(model).__name__} keeps a sliding window of {window} tokens: "
            "there is no cache of the whole context to shorten"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(DECODERS[type(body).__name__], body, attention, treated, heads, kv_heads, head_dim)


@dataclass(frozen=True)
class Vision:
    """One row of the table of multimodal models: names of the parts, from the model that has `get_image_features`.

    Attributes:
        name: Architecture, as `kr.methods()` and errors call it.
        tower: The vision encoder.
        projector: What turns its features into the language model's embeddings.
        cross: Whether the language model reads the image through cross-attention, not as tokens of its own sequence.
    """

    name: str
    tower: str
    projector: str
    cross: bool = False


MULTIMODAL = {
    "LlavaModel": Vision("llava", "vision_tower", "multi_modal_projector"),
    "LlavaNextModel": Vision("llava_next", "vision_tower", "multi_modal_projector"),
    "LlavaOnevisionModel": Vision("llava_onevision", "vision_tower", "multi_modal_projector"),
    "Qwen2_5_VLModel": Vision("qwen2_5_vl", "visual", "visual.merger"),
    "InternVLModel": Vision("internvl", "vision_tower", "multi_modal_projector"),
    "MllamaModel": Vision("mllama", "vision_model", "multi_modal_projector", cross=True),
}

# class name of a vision encoder's block -> (name of its attention, tokens in front of the patches)
_TOWER_BLOCKS = {
    "CLIPEncoderLayer": ("self_attn", 1),
    "SiglipEncoderLayer": ("self_attn", 0),
    "Qwen2_5_VLVisionBlock": ("attn", 0),
    "InternVLVisionLayer": ("attention", 1),
    "MllamaVisionEncoderLayer": ("self_attn", 1),
}


@dataclass(frozen=True)
class Multimodal:
    """A multimodal language model as the visual-token methods see it.

    Attributes:
        name: Architecture, as `kr.methods()` and errors call it.
        inner: The model that encodes images and calls the language model.
        body: The language model's stack of decoder layers.
        layers: The decoder layers.
        tower: The vision encoder.
        tower_layers: Its blocks.
        tower_attention: Their attention modules.
        projector: Vision features -> embeddings.
        prefix: Tokens in front of the patches inside the tower.
        feature: 0-based tower block whose output the projector gets.
        cross: Whether the image is read through cross-attention.
    """

    name: str
    inner: nn.Module
    body: nn.Module
    layers: tuple[nn.Module, ...]
    tower: nn.Module
    tower_layers: tuple[nn.Module, ...]
    tower_attention: tuple[nn.Module, ...]
    projector: nn.Module
    prefix: int
    feature: int
    cross: bool

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def has_cls(self) -> bool:
        """Whether the tower has a class token."""
        return self.prefix > 0

    @property
    def windowed(self) -> bool:
        """Whether the tower attends in windows, to all images in one sequence whose order it changes (Qwen)."""
        return hasattr(self.tower, "permute_input_for_window_attn")

    @property
    def shuffled(self) -> bool:
        """Whether neighbouring patches are stacked into one token before the projector (InternVL)."""
        return hasattr(self.inner, "pixel_shuffle")

    @property
    def axes(self) -> int:
        """Axes of the position ids: 3 with multimodal rotary embeddings."""
        return 3 if hasattr(self.inner, "get_rope_index") else 1


def multimodal(model: nn.Module) -> Multimodal:
    """The multimodal model inside a model, with its parts.

    Raises:
        ValueError: If there is none, or more than one, of a supported class, or its vision encoder is unknown.

    Example:
        >>> multimodal(kr.load("llava-digits").model).name   # doctest: +SKIP
        'llava'
    """
    found = [m for m in model.modules() if type(m).__name__ in MULTIMODAL] if isinstance(model, nn.Module) else []
    if len(found) != 1:
        names = ", ".join(type(m).__name__ for m in found) or "none"
        raise ValueError(
            f"{type(model).__name__} must hold exactly one multimodal model of a supported class "
            f"({', '.join(MULTIMODAL)}); found {names}{_inside(model)}"
        )
    inner = found[0]
    row = MULTIMODAL[type(inner).__name__]
    tower = inner.get_submodule(row.tower)
    blocks = [m for m in tower.modules() if type(m).__name__ in _TOWER_BLOCKS]
    if not blocks:
        raise ValueError(
            f"the vision encoder {type(tower).__name__} of this {type(model).__name__} is not supported; its blocks "
            f"must be one of {', '.join(_TOWER_BLOCKS)}"
        )
    attention, prefix = _TOWER_BLOCKS[type(blocks[0]).__name__]
    feature = getattr(inner.config, "vision_feature_layer", -1)
    feature = feature if isinstance(feature, int) else feature[-1]
    body = inner.language_model
    return Multimodal(
        row.name,
        inner,
        body,
        tuple(body.layers),
        tower,
        tuple(blocks),
        tuple(getattr(block, attention) for block in blocks),
        inner.get_submodule(row.projector),
        prefix,
        feature + len(blocks) if feature < 0 else feature - 1,  # entry 0 of the hidden states is the embedding
        row.cross,
    )
