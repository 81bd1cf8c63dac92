"""Where each supported architecture keeps its blocks, prefix tokens and pooling. The only file that knows.

A block is described by the names of its own submodules, so no forward pass is copied: the two halves below call the
same modules in the same order as transformers does, and a test proves the result bit-identical at keep=1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
        raise ValueError(f"expected a transformers model; got {type(model).__name__}")
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
