"""Train ``clip-digits``: a small CLIP that knows what lies where in scenes of digits and photographs.

Its vision tower becomes that of ``llava-digits``, unchanged. A tower that serves a language model must say of every
patch what it shows and where; from the contrastive loss of CLIP alone this takes far longer to learn than there is
time. So, besides image against caption, training asks

* every patch of the layer that LLaVA reads, the last but one: which class covers it, on which place, in which colour;
* the CLS token of the last two layers: which classes are there, and on what background;
* short texts, among them the questions of ``keeprate.tasks.scenes``: of which images, and which of their patches, they
  speak.

The last makes a text embedding comparable with patch embeddings, which methods that prune by CLIP similarity rely on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeprate.tasks import scenes
from keeprate.train import loop

NAME = "clip-digits"
PAD, BOS, IMAGE, EOS = range(4)  # not 2 for EOS: transformers' CLIP takes that id for a sign of old checkpoints
SPECIAL = ("<pad>", "<s>", "<image>", "</s>")
CONTEXT = 64  # tokens of a caption; 7 items of 6 words, two words, BOS and EOS are the most
CLASSES, PLACES, COLOURS = len(scenes.CLASSES), len(scenes.PLACES), len(scenes.COLOURS)

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": scenes.SIDE,
    "patch_size": scenes.PATCH,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        steps: optimiser steps.
        batch: scenes a step.
        clutter: brightness of the backgrounds at the start and at the end of the stage, linear in between.
        crowd: share of the steps that show full boards and ask for patches alone; see `scenes.crowd`.
    """

    steps: int
    batch: int = 64
    clutter: tuple[float, float] = (1.0, 1.0)
    crowd: float = 0.0


RECIPE = loop.Recipe(
    stages=(
        Stage(500, batch=32, clutter=(0.0, 0.2), crowd=1.0),
        Stage(400, batch=32, clutter=(0.2, 1.0), crowd=1.0),
        Stage(400, crowd=0.4),
        Stage(1400, crowd=0.6),
    ),
    lr=1.5e-3,
    warmup=100,
    decay=0.35,
)


def texts() -> dict[str, list[str]]:
    """Short texts about items, in the order of `about`: what they speak of, and ways to say it."""
    said = {
        word: ["{}", "a {}", "is there a {}", "where is the {}", "what colour is the {}"] for word in scenes.CLASSES
    }
    said |= {word: ["at {}", "what is at {}"] for word in scenes.PLACES}
    said |= {word: ["{}", "a {} digit"] for word in scenes.COLOURS}
    filled = {word: [way.format(word) for way in ways] for word, ways in said.items()}
    filled["digits"] = ["digits", "how many digits", "which digit is largest"]
    filled["photos"] = ["photos", "how many photos"]
    filled |= {f"row {row}": [f"row {row}", f"read row {row}"] for row in range(1, scenes.BOARD + 1)}
    filled |= {word: [f"on {word}", f"{word} background"] for word in scenes.BACKGROUNDS}
    return filled


def about(classes: Tensor, cells: Tensor, colours: Tensor) -> Tensor:
    """Which items the short texts speak of; see `texts`.

    Args:
        classes, cells, colours: int64 [n, 7], as in `scenes.Drawn`.

    Returns:
        bool [n, 7, texts], without those about backgrounds.
    """

    def one(index: Tensor, among: int) -> Tensor:
        return index[:, :, None] == torch.arange(among, device=index.device)

    digit, filled = colours >= 0, classes >= 0
    row = one(cells.where(digit, -1).div(scenes.BOARD, rounding_mode="floor"), scenes.BOARD)
    parts = [one(classes, CLASSES), one(cells, PLACES), one(colours, COLOURS)]
    return torch.cat([*parts, digit[:, :, None], (filled & ~digit)[:, :, None], row], -1)


@lru_cache
def vocabulary() -> tuple[str, ...]:
    """All words of questions, answers and captions."""
    lines = [way for ways in texts().values() for way in ways]
    lines += ["yes no", "what is the background", "a red 7 at b1 and a cat at c2 on grass"]
    return tuple(dict.fromkeys(word for line in lines for word in line.split()))


def tokenizer(clip: bool = False) -> Any:
    """A tokenizer in which every word of the scenes is one token and any other text falls apart into bytes.

    Byte-level BPE whose merges spell the words from left to right, a space before each; text is put in lower case.

    Args:
        clip: whether texts end with EOS, as CLIP needs them; a prompt of LLaVA must not.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        ids[byte] = len(ids)
    merges = []
    for word in vocabulary():
        whole = f"Ġ{word}"
        for end in range(1, len(whole)):
            pair = (whole[:end], whole[end])
            if pair not in merges:
                merges.append(pair)
                ids.setdefault(whole[: end + 1], len(ids))
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^ ]+| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    around = ("<s>", BOS), ("</s>", EOS)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if clip else "<s> $A", special_tokens=list(around)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_max_length=CONTEXT if clip else 1024,
        padding_side="right" if clip else "left",
    )


def image_processor() -> Any:
    """Images of any size to 96x96 pixels in -1..1; those of the scenes pass unchanged."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = scenes.SIDE
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def normalised(pixels: Tensor) -> Tensor:
    """What `image_processor` makes of scenes.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 in -1..1, same shape.
    """
    return pixels.float() / 127.5 - 1


def products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as two matrix products, as transformers calls it, for training on a CPU in bfloat16.

    With 145 tokens torch's own attention takes half of a training step, nearly all of it in the backward pass.

    Args:
        module: ignored.
        query: [b, h, n, d].
        key, value: [b, g, n, d], heads of the query share them.
        attention_mask: [b or 1, 1, n, n], added to the scores.
        scaling: of the scores.

    Returns:
        [b, n, h, d], and None for the weights.
    """
    b, h, n, d = query.shape
    g = key.shape[1]
    scores = (query * scaling).reshape(b, g, h // g * n, d) @ key.mT
    if attention_mask is not None:
        scores = (scores.view(b, g, h // g, n, n) + attention_mask[:, :, None].to(scores.dtype)).view_as(scores)
    return (scores.softmax(-1, dtype=scores.dtype) @ value).view(b, h, n, d).transpose(1, 2), None


def attend_by(attention: Callable[..., tuple[Tensor, None]], model: nn.Module) -> None:
    """Let a transformers model attend by a function; ``model.set_attn_implementation("sdpa")`` takes it back.

    Args:
        attention: such as `products`.
        model: changed in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(attention.__name__, attention)
    AttentionMaskInterface.register(attention.__name__, eager_mask)
    model.set_attn_implementation(attention.__name__)


def places(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column: patches near each other have embeddings alike.

    Args:
        side: of the grid.
        width: of the embeddings, a multiple of 4.

    Returns:
        [side * side, width], of deviation 1.
    """
    length = torch.logspace(0.4, 1.7, width // 4, 10.0)  # 2.5 to 50 patches a wave
    angle = 2 * torch.pi * torch.arange(side)[:, None] / length
    wave = torch.cat([angle.sin(), angle.cos()], 1) * 2**0.5  # side width/2
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def start(tower: nn.Module) -> None:
    """Weights to begin with that let so narrow a tower learn: CLIP's own begin with even attention and faint positions.

    From CLIP's own, a third of the patches with a digit were known after 500 steps.

    Args:
        tower: a CLIP vision tower, changed in place.
    """
    with torch.no_grad():
        for layer in tower.encoder.layers:
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            for linear in linears:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for out in (layer.self_attn.out_proj, layer.mlp.fc2):  # the residual stream keeps its scale
                out.weight /= (2 * len(tower.encoder.layers)) ** 0.5
        embeddings = tower.embeddings
        nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
        nn.init.normal_(embeddings.class_embedding, std=0.5)
        position = embeddings.position_embedding.weight
        position[1:] = 0.5 * places(scenes.GRID, position.shape[1])
        nn.init.normal_(position[:1], std=0.5)


class Learner(nn.Module):
    """A CLIP model with the heads that only training needs.

    Args:
        words: size of the vocabulary.
        seed: of the initial weights.
    """

    def __init__(self, words: int, seed: int = 0) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        torch.manual_seed(seed)
        text = {
            "vocab_size": words,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "hidden_act": "gelu",
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=64))
        width = VISION["hidden_size"]
        start(self.clip.vision_model)
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES + 1 + PLACES + COLOURS))
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES + len(scenes.BACKGROUNDS))) for _ in range(2)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the last two layers.

        Args:
            pixels: [b, 3, 96, 96], normalised.

        Returns:
            [b, 145, width] before and after the last layer.
        """
        states = self.clip.vision_model(pixels, output_hidden_states=True).hidden_states
        return states[-2], states[-1]

    def image(self, hidden: Tensor) -> Tensor:
        """Embeddings of CLS and patches in the space of the texts, of length 1.

        Args:
            hidden: [b, 145, width], of the last layer.

        Returns:
            [b, 145, 64].
        """
        return F.normalize(self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden)).float(), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """Embeddings of texts, of length 1.

        Args:
            ids: int64 [t, length], padded.

        Returns:
            [t, 64].
        """
        pooled = self.clip.text_model(ids, attention_mask=(ids != PAD).long()).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)


def several_right(logits: Tensor, right: Tensor, dim: int) -> Tensor:
    """Cross-entropy where several answers are right, each equally; mean over the questions that have one.

    Args:
        logits: any shape.
        right: bool, same shape.
        dim: of the answers.
    """
    target = right / right.sum(dim, keepdim=True).clamp_min(1)
    each = -(target * logits.float().log_softmax(dim)).sum(dim)
    return each.sum() / right.any(dim).sum().clamp_min(1)


class Trainer(loop.Trainer):
    """All losses at once.

    Args:
        model: a ``Learner``.
        tokenizer: of the texts.
        recipe: the run, with stages of this module.
        device: "cpu" or "cuda".
        bf16: whether the forward pass runs under bfloat16 autocast.
    """

    def __init__(
        self, model: Learner, tokenizer: Any, recipe: loop.Recipe, device: str = "cpu", bf16: bool = True
    ) -> None:
        super().__init__(model, recipe, device, bf16)
        self.tokenizer = tokenizer
        attend_by(products, model.clip)
        ways = list(texts().values())
        most = max(map(len, ways))
        flat = [line for each in ways for line in (each * most)[:most]]
        self.ways = tokenizer(flat, padding=True, return_tensors="pt").input_ids.unflatten(0, (len(ways), most))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Scenes of a step with their captions and one way to say each short text.

        Args:
            step: 0 .. steps - 1.
        """
        stage, behind = self.recipe.stage(step)
        rng = np.random.default_rng([self.recipe.seed, step])
        low, high = stage.clutter
        clutter = low + (high - low) * behind
        if rng.random() < stage.crowd:
            drawn = scenes.crowd(rng, stage.batch // 2 if stage.crowd < 1 else stage.batch, "train", clutter)
            return drawn.pixels, drawn.classes, drawn.cells, drawn.colours, drawn.patches
        drawn = scenes.draw(rng, stage.batch, "train", clutter=clutter)
        caption = self.tokenizer(scenes.captions(drawn), padding=True, return_tensors="pt").input_ids
        way = torch.from_numpy(rng.integers(self.ways.shape[1], size=len(self.ways)))
        short = self.ways[torch.arange(len(way)), way]
        return drawn.pixels, drawn.classes, drawn.cells, drawn.colours, drawn.patches, drawn.background, caption, short

    def loss(
        self,
        pixels: Tensor,
        classes: Tensor,
        cells: Tensor,
        colours: Tensor,
        patches: Tensor,
        background: Tensor | None = None,
        caption: Tensor | None = None,
        short: Tensor | None = None,
    ) -> tuple[Tensor, tuple[float, ...]]:
        """The sum of all losses; for the log, shares that are right.

        Args:
            pixels: uint8 [b, 3, 96, 96].
            classes, cells, colours, patches, background: as in `scenes.Drawn`.
            caption: int64 [b, length], token ids.
            short: int64 [texts, length], token ids; without these three, of crowds, the loss of patches alone.
        """
        model = self.model
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            before, last = model(normalised(pixels))
            of_patch = model.patch(before[:, 1:]).float()

        # every patch: class, and where something lies, place and colour
        slot = patches.int().argmax(1)  # b 144
        empty = ~patches.any(1)
        what, where, colour = (each.gather(1, slot) for each in (classes, cells, colours))
        what_logits, where_logits, colour_logits = of_patch.split([CLASSES + 1, PLACES, COLOURS], -1)
        what = what.masked_fill(empty, CLASSES)
        each = F.cross_entropy(what_logits.transpose(1, 2), what, reduction="none")
        weight = torch.where(empty, 0.2, 1.0)
        patch_loss = (each * weight).sum() / weight.sum()
        patch_loss = patch_loss + 0.5 * F.cross_entropy(where_logits[~empty], where[~empty])
        inked = (colour >= 0) & ~empty
        patch_loss = patch_loss + 0.5 * F.cross_entropy(colour_logits[inked], colour[inked])

        with torch.no_grad():
            right = (what_logits.argmax(-1) == what)[~empty].float().mean().item()
            digit = (what_logits.argmax(-1) == what)[inked].float().mean().item()
            placed = (where_logits.argmax(-1) == where)[~empty].float().mean().item()
        if background is None:
            return 2 * patch_loss, (right, digit, placed, *[float("nan")] * 3)

        # CLS: what is there, and on what
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            of_cls = [head(hidden[:, 0]).float() for head, hidden in zip(model.cls, (before, last), strict=True)]
            image, long, brief = model.image(last), model.text(caption), model.text(short)
        there = (classes[:, :, None] == torch.arange(CLASSES, device=classes.device)).any(1).float()
        cls_loss = sum(
            2 * F.binary_cross_entropy_with_logits(logits[:, :CLASSES], there)
            + 0.3 * F.cross_entropy(logits[:, CLASSES:], background)
            for logits in of_cls
        )

        # image and texts
        scale = model.clip.logit_scale.exp().clamp_max(100)
        same = torch.eye(len(pixels), dtype=torch.bool, device=pixels.device)
        against = scale * image[:, 0] @ long.T
        contrast = several_right(against, same, 0) + several_right(against, same, 1)
        item = about(classes, cells, colours)  # b 7 t
        items = item.shape[2]
        ground = background[:, None] == torch.arange(len(scenes.BACKGROUNDS), device=background.device)
        matches = torch.cat([item.any(1), ground], 1)
        against = scale * image[:, 0] @ brief.T
        contrast = contrast + several_right(against, matches, 0) + several_right(against, matches, 1)
        speaks = torch.einsum("bst,bsp->btp", item.float(), patches.float()) > 0
        near = scale * torch.einsum("bpd,td->btp", image[:, 1:], brief[:items])
        found = several_right(near, speaks, 2)

        with torch.no_grad():
            seen = ((of_cls[0][:, :CLASSES] > 0) == there.bool()).float().mean().item()
            peak = speaks.gather(2, near.argmax(2, keepdim=True))[:, :, 0]
            pointed = peak[speaks.any(2)].float().mean().item()
        numbers = right, digit, placed, seen, contrast.item(), pointed
        return 2 * patch_loss + cls_loss + 0.25 * contrast + 0.3 * found, numbers

    def describe(self, numbers: Sequence[float]) -> str:
        """A line of the log."""
        loss, right, digit, placed, seen, contrast, pointed = numbers
        return (
            f"loss {loss:.3f} patches: class {right:.3f} of digits {digit:.3f} place {placed:.3f}; "
            f"CLS presence {seen:.3f} contrast {contrast:.3f}; text points at {pointed:.3f}"
        )


@torch.inference_mode()
def measure(model: Learner, tokenizer: Any, n: int = 1024, seed: int = 2026, split: str = "test") -> dict[str, Any]:
    """What the card says about the model, on scenes that nobody has seen.

    Args:
        model: on the CPU, in eval mode.
        tokenizer: of the texts.
        n: scenes.
        seed: of the scenes.
        split: "train" or "test".

    Returns:
        Entries of the card.
    """
    drawn = scenes.draw(np.random.default_rng([seed, 99]), n, split)
    ways = [ways[0] for ways in texts().values()]
    brief = model.text(tokenizer(ways, padding=True, return_tensors="pt").input_ids)
    item = about(drawn.classes, drawn.cells, drawn.colours)
    brief = brief[: item.shape[2]]
    speaks = torch.einsum("nst,nsp->ntp", item.float(), drawn.patches.float()) > 0
    digits, photos, pointed, retrieved = [], [], [], []
    for part in torch.arange(n).split(64):
        before, last = model(normalised(drawn.pixels[part]))
        log = model.patch(before[:, 1:])[:, :, :CLASSES].log_softmax(-1)
        of = drawn.patches[part].float()
        found = torch.einsum("bsp,bpc->bsc", of, log).argmax(-1) == drawn.classes[part]  # all patches of an item vote
        digits.append(found[drawn.colours[part] >= 0])
        photos.append(found[(drawn.classes[part] >= 0) & (drawn.colours[part] < 0)])
        image = model.image(last)
        near = torch.einsum("bpd,td->btp", image[:, 1:], brief)
        peak = speaks[part].gather(2, near.argmax(2, keepdim=True))[:, :, 0]
        pointed.append(peak[speaks[part].any(2)])
        long = model.text(
            tokenizer(scenes.captions(scenes.Drawn(*(getattr(drawn, name)[part] for name in FIELDS))), padding=True,
                      return_tensors="pt").input_ids
        )  # fmt: skip
        retrieved.append((image[:, 0] @ long.T).argmax(1) == torch.arange(len(part)))
    shares = {"digits": digits, "photos": photos, "text_points_at": pointed, "caption_of_64": retrieved}
    return {name: loop.proportion(int(torch.cat(hits).sum()), len(torch.cat(hits))) for name, hits in shares.items()}


FIELDS = ("pixels", "classes", "cells", "colours", "patches", "background")


def main() -> None:
    """The command line: train or resume, measure, publish."""
    from transformers import CLIPProcessor

    options = loop.options(NAME)
    options.add_argument("--fp32", action="store_true", help="no bfloat16, for processors that are slow at it")
    options.add_argument("--seed", type=int, default=2026, help="of the sample that is measured")
    given = options.parse_args()

    torch.set_num_threads(given.threads)
    words, checkpoint = tokenizer(clip=True), given.work / f"{NAME}.safetensors"
    model = Learner(len(words), RECIPE.seed)
    trainer = Trainer(model, words, RECIPE, given.device, not given.fp32)
    if given.interim:
        trainer.restore(checkpoint)
    else:
        trainer.run(checkpoint)
    model.load_state_dict(trainer.averaged(), strict=False)  # position ids are no parameters
    model.cpu().eval()
    model.clip.set_attn_implementation("sdpa")
    model.clip.to(torch.bfloat16).to(torch.float32)  # as it will be stored
    final = trainer.step == RECIPE.steps
    found = measure(model, words, seed=given.seed)
    facts = {
        "name": NAME,
        "task": "scenes",
        "status": "final" if final else f"interim: step {trainer.step} of {RECIPE.steps}",
        "train_command": f"python -m keeprate.train.clip_digits --out data/models/{NAME}",
        "data": DATA,
        "accuracy": found["digits"]
        | {"kind": "class of a digit, by a linear head on the patches of the last layer but one"},
        "measured": found,
        "history": HISTORY,
        "sample": f"keeprate.train.clip_digits.measure(model, tokenizer, seed={given.seed})",
    }
    processor = CLIPProcessor(image_processor(), words)
    card = loop.publish(model.clip.to(torch.bfloat16), given.out, RECIPE, trainer, facts, processor.save_pretrained)
    if final:
        checkpoint.unlink()
    print(json.dumps({key: card[key] for key in ("status", "measured", "minutes", "params")}, indent=1))


HISTORY = (
    "Two earlier attempts without crowded scenes were given up after some 500 and 450 steps; in the second, three "
    "in ten digits were known by then. The last stage was added at step 1263, from where the run was taken up "
    "again. Digits of training were bent and slanted less than keeprate.tasks.scenes does now. A further run of "
    "900 steps from this result, with as much as now, knew 96.0 % of the digits of another sample (seed=2027), no "
    "more than this one, and was not used. The sample measured above was looked at once, after training."
)
DATA = {
    "recipe": "keeprate.tasks.scenes: real handwritten digits and small photographs on photographs, rendered without "
    "end from the seed; trained on eleven writers and one part of each background, measured on three other writers and "
    "another part",
    "image_pixels": scenes.SIDE,
    "patch_pixels": scenes.PATCH,
}

if __name__ == "__main__":
    main()
