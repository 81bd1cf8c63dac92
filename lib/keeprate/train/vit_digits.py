"""Train ``vit-digits``: a small ViT that reads one handwritten digit on a photograph.

The curriculum saves most of the time. Four of the twelve blocks first see a window of 6x6 patches with the digit, at a
random place of the 14x14 grid and with that place's position embeddings; it is black at first and photographs are faded
in. Then the window grows, the other blocks join, and training ends on the full image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keeprate.tasks import digits
from keeprate.train import common
from keeprate.train.common import Recipe, Stage

RECIPE = Recipe(
    stages=(
        Stage(1000, side=6, batch=64, depth=4, clutter=(0.0, 0.2)),
        Stage(4000, side=6, batch=64, depth=4, clutter=(0.2, 1.0)),
        Stage(1500, side=10, batch=64, depth=4),
        Stage(1600, side=8, batch=64),
        Stage(900, side=14, batch=48),
    ),
    decay=0.2,
)
INIT = 0.08  # deviation of the weights; transformers' 0.02 is meant for widths near 1000 and learns slowly at 96


def build(seed: int = 0) -> nn.Module:
    """An untrained ``ViTForImageClassification``: 12 layers of width 96, 14x14 patches of 4 pixels.

    Args:
        seed: of the weights.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=384,
            initializer_range=INIT,
            image_size=digits.GRID * digits.PATCH,
            patch_size=digits.PATCH,
            id2label=dict(enumerate(digits.CLASSES)),
            label2id={name: index for index, name in enumerate(digits.CLASSES)},
        )
    )
    for block in model.vit.layers:  # every block starts as the identity, so depth can grow while training
        nn.init.zeros_(block.attention.o_proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    return model


def forward(
    model: nn.Module, pixels: Tensor, place: Tensor, depth: int | None = None, keep: tuple[int, Tensor] | None = None
) -> Tensor:
    """Logits for images that show a part of the grid; see ``common.Forward``."""
    embeddings = model.vit.embeddings
    x = embeddings.patch_embeddings.projection(pixels).flatten(2).mT  # b n c
    position = embeddings.position_embeddings[0]  # 1+N c
    x = x + position[place + 1]
    cls = (embeddings.cls_token[0] + position[:1]).expand(len(x), 1, -1)
    x = torch.cat([cls, x], dim=1)
    for i, block in enumerate(model.vit.layers):
        if depth and (i + 1) % (len(model.vit.layers) // depth):
            continue
        if keep and i == keep[0]:
            index = torch.cat([torch.zeros_like(keep[1][:, :1]), keep[1] + 1], dim=1)  # b 1+k
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        x = block(x)
    return model.classifier(model.vit.layernorm(x[:, 0]))


if __name__ == "__main__":
    common.main("vit-digits", RECIPE, lambda: build(RECIPE.seed), forward, {})
