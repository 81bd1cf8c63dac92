"""Train ``siglip-digits``: the vision tower of SigLIP, which has no CLS token and averages its patches.

Its blocks have the same parts as a ViT's, so it starts from the trained ``vit-digits`` and learns to do without CLS.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from keeprate.tasks import digits
from keeprate.train import common
from keeprate.train.common import Recipe, Stage

RECIPE = Recipe(
    stages=(Stage(250, side=8, batch=64), Stage(250, side=14, batch=48)),
    seed=1,
    lr=7e-4,
    warmup=50,
    decay=0.8,
    ema=0.99,
)
START = Path("data/models/vit-digits")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
)
PARTS = {
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def build(vit: nn.Module) -> nn.Module:
    """A ``SiglipForImageClassification`` with the weights of a ViT.

    Args:
        vit: ``ViTForImageClassification``; its CLS token is left behind.
    """
    from transformers import SiglipConfig, SiglipForImageClassification

    vision = {key: getattr(vit.config, key) for key in SIZES} | {"vision_use_head": False}
    text = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # no text tower is built
    model = SiglipForImageClassification(
        SiglipConfig(
            text_config=text,
            vision_config=vision,
            id2label=dict(enumerate(digits.CLASSES)),
            label2id={name: index for index, name in enumerate(digits.CLASSES)},
        )
    )
    tower = model.vision_model
    tower.embeddings.patch_embedding.load_state_dict(vit.vit.embeddings.patch_embeddings.projection.state_dict())
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.copy_(vit.vit.embeddings.position_embeddings[0, 1:])
    for new, block in zip(tower.encoder.layers, vit.vit.layers, strict=True):
        for theirs, ours in PARTS.items():
            new.get_submodule(ours).load_state_dict(block.get_submodule(theirs).state_dict())
    tower.post_layernorm.load_state_dict(vit.vit.layernorm.state_dict())
    model.classifier.load_state_dict(vit.classifier.state_dict())
    return model


def forward(
    model: nn.Module, pixels: Tensor, place: Tensor, depth: int | None = None, keep: tuple[int, Tensor] | None = None
) -> Tensor:
    """Logits for images that show a part of the grid; see ``common.Forward``. All blocks run."""
    tower = model.vision_model
    x = tower.embeddings.patch_embedding(pixels).flatten(2).mT + tower.embeddings.position_embedding(place)  # b n c
    for i, block in enumerate(tower.encoder.layers):
        if keep and i == keep[0]:
            x = x.gather(1, keep[1][..., None].expand(-1, -1, x.shape[-1]))
        x = block(x, attention_mask=None)
    return model.classifier(tower.post_layernorm(x).mean(1))


def start() -> nn.Module:
    """The model before fine-tuning: ``vit-digits`` of this checkout without its CLS token."""
    from transformers import ViTForImageClassification

    torch.manual_seed(RECIPE.seed)
    return build(ViTForImageClassification.from_pretrained(START))


if __name__ == "__main__":
    warm = {"warm_start": "all weights of vit-digits but its CLS token; then all fine-tuned"}
    common.main("siglip-digits", RECIPE, start, forward, warm)
