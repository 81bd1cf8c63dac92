"""The question beside an image, compared with its tokens: by the model's own embeddings or in a CLIP model's space."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from keeprate.mllm.base import Visual
from keeprate.models import Loaded, load

SIGNS = (None, 1, -1)


@lru_cache(maxsize=1)
def _clip(name: str, device: torch.device) -> Loaded:
    """A CLIP model by the name `kr.load` knows."""
    loaded = load(name, device=device)
    if not all(hasattr(loaded.model, part) for part in ("visual_projection", "text_projection")):
        raise ValueError(f"clip must name a CLIPModel; {name!r} is a {type(loaded.model).__name__}")
    return loaded


@torch.no_grad()
def clip_space(t: Visual, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and questions in the space of a CLIP model.

    Patches are what the projector of the language model gets, through CLIP's last norm and projection: the vision
    encoder must be the one of that CLIP model.

    Args:
        t: The images, with their questions as text.
        name: For `kr.load`.

    Returns:
        (patches [i, n, c], questions [i, c]) in fp32, not normalised.

    Raises:
        ValueError: Without questions, if `name` is no CLIP model, or the vision encoder has another width.

    Source: the released code of TRIM, which takes the same features.
    """
    words, loaded = t.asked(), _clip(name, t.x.device)
    model, tokenizer = loaded.model, getattr(loaded.processor, "tokenizer", loaded.processor)
    width = model.visual_projection.in_features
    if t.features.shape[-1] != width:
        raise ValueError(
            f"{name!r} projects patches of width {width}; those of this {t.parts.name} have {t.features.shape[-1]}: "
            "clip must name the CLIP model that the vision encoder comes from"
        )
    longest = model.config.text_config.max_position_embeddings
    ids = tokenizer(words, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(t.x.device)
    said = model.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
    seen = model.vision_model.post_layernorm(t.features.to(said.dtype))
    return model.visual_projection(seen).float(), model.text_projection(said).float()


def relevance(t: Visual, clip: str = "", sign: int | None = 1, unit: bool = True) -> torch.Tensor:
    """Similarity of every visual token to the question.

    Args:
        t: The images.
        clip: Name of the CLIP model that the vision encoder comes from; "" compares with the language model's own
            embeddings of the words instead, and takes the mean cosine over the words.
        sign: -1 returns minus the similarity: OpenAI's CLIP was trained on whole images, and its patches are least
            like the text that names them. None = -1 with `clip`, as the released codes have it, but 1 without and
            with an embedded model, whose patches are trained to be like their text.
        unit: False leaves CLIP's embeddings as long as they are.

    Returns:
        [i, n] in fp32; padding may be anything.
    """
    if clip:
        patches, question = clip_space(t, clip)
        if unit:
            patches, question = F.normalize(patches, dim=-1), F.normalize(question, dim=-1)
    else:
        words, valid = t.question()
        words = F.normalize(words.float(), dim=-1)
        there = torch.ones_like(words[..., 0]) if valid is None else valid.float()
        question = (words * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        patches = F.normalize(t.x.float(), dim=-1)
    if sign is None:
        sign = -1 if clip and not _clip(clip, t.x.device).card else 1
    return sign * (patches @ question[..., None])[..., 0]
