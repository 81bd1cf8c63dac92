"""Tiny checkpoints of every supported class, saved to disk and loaded back the way a user's are.

Weights are drawn wide, so that attention is peaked and losing a token shows in the logits; LayerScale is far from 1,
biases are not 0, norms are not the identity. A plumbing mistake cannot hide behind a small number.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

DEPTH, GRID, PATCH, LABELS = 4, (8, 8), 8, 7
SIZE = GRID[0] * PATCH
_SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_WIDE = {**_SHAPE, "intermediate_size": 96}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_DINO = {**_SHAPE, **_DROPOUT, "mlp_ratio": 2, "drop_path_rate": 0.1, "num_labels": LABELS}


def _clip(joint: type, vision: type, **more):
    config = joint(vision_config=vision(**_WIDE, attention_dropout=0.1, **more).to_dict())
    config.num_labels = LABELS
    return config


# checkpoint -> (architecture as the library names it, class, configuration)
CHECKPOINTS = {
    "vit": ("vit", ViTForImageClassification, lambda: ViTConfig(**_WIDE, **_DROPOUT, num_labels=LABELS)),
    "deit": ("deit", DeiTForImageClassification, lambda: DeiTConfig(**_WIDE, **_DROPOUT, num_labels=LABELS)),
    "dinov2": ("dinov2", Dinov2ForImageClassification, lambda: Dinov2Config(**_DINO, qkv_bias=True)),
    "dinov2-swiglu": ("dinov2", Dinov2ForImageClassification, lambda: Dinov2Config(**_DINO, use_swiglu_ffn=True)),
    "dinov2_with_registers": (
        "dinov2_with_registers",
        Dinov2WithRegistersForImageClassification,
        lambda: Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3),
    ),
    "clip": ("clip", CLIPForImageClassification, lambda: _clip(CLIPConfig, CLIPVisionConfig)),
    "siglip": ("siglip", SiglipForImageClassification, lambda: _clip(SiglipConfig, SiglipVisionConfig)),
}

VOCABULARY, LAYERS = 97, 3
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Gemma 3 mixes sliding windows with full attention: only the full layers have a cache to shorten
_MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 24}

# language models: checkpoint -> (architecture, class, configuration)
DECODERS = {
    "llama": ("llama", LlamaForCausalLM, lambda: LlamaConfig(**_TEXT)),
    "llama-8-heads": (
        "llama",
        LlamaForCausalLM,
        lambda: LlamaConfig(**{**_TEXT, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}),
    ),
    "mistral": ("mistral", MistralForCausalLM, lambda: MistralConfig(**_TEXT, sliding_window=None)),
    "qwen2": ("qwen2", Qwen2ForCausalLM, lambda: Qwen2Config(**_TEXT)),
    "qwen3": ("qwen3", Qwen3ForCausalLM, lambda: Qwen3Config(**_TEXT)),
    "gemma": ("gemma", GemmaForCausalLM, lambda: GemmaConfig(**{**_TEXT, "num_key_value_heads": 1})),
    "gemma3": ("gemma3", Gemma3ForCausalLM, lambda: Gemma3TextConfig(**_TEXT, **_MIXED, query_pre_attn_scalar=16)),
}


def widen(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, wide enough for peaked attention."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "lambda" in name:  # LayerScale
            p.data = 0.6 + 0.2 * noise
        elif p.numel() == 1:  # gates that are closed at first
            p.data = torch.full_like(p, 0.8)
        elif p.dim() == 1 and name.endswith("weight"):  # norms
            p.data = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = 0.1 * noise
        elif p.dim() >= 4:  # patch embedding
            p.data = 0.08 * noise
        elif p.dim() == 2 and "position" not in name and "class" not in name:
            p.data = 0.25 * noise
        else:  # position embeddings, class, distillation and register tokens
            p.data = 0.7 * noise


def save(name: str, folder: Path, table: Mapping[str, tuple] = CHECKPOINTS | DECODERS, *, mute: int = 0) -> Path:
    """Build a checkpoint and save it under `folder`.

    Args:
        name: Which one of `table`.
        folder: Where it gets a folder of its own.
        table: Checkpoints by name: (architecture, class, configuration).
        mute: Ids below this one are never generated, so that no answer holds a placeholder of a picture.

    Returns:
        Its folder.
    """
    _, cls, config = table[name]
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config())
    with torch.no_grad():
        widen(model, sum(map(ord, name)))
        if mute:
            model.get_output_embeddings().weight[:mute] = 0.0  # a logit of 0 is never the largest of many
    model.save_pretrained(folder / name)
    return folder / name


def pixels(batch: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    """[batch, 3, height, width] smooth shapes plus noise: neighbouring patches resemble each other, as in a picture."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 5, 5, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return smooth + 0.3 * torch.randn(batch, 3, *size, generator=g)


def tokens(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    """[batch, n] random ids, none of them padding, with a beginning-of-sequence token first."""
    ids = torch.randint(2, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids
