"""Train ``llama-docs``: a small Llama that reads reference text and recalls what was written into it.

Recall is an induction: find the key's earlier occurrence, copy what stood behind it. Heads that do so form within
minutes on short, dense sequences and hardly ever on long, sparse ones, so the curriculum begins with repeated random
tokens, then asks for many facts in short contexts, and lengthens the contexts while the heads stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeprate.tasks import docs, recall
from keeprate.train import loop

VOCABULARY = 2048
CONTEXT = 4096
BLOCK = 128  # queries that `grouped` treats at a time
KINDS = ("needles", "variables", "copy")  # of facts; `needle` is `needles` with one
IGNORED, TEXT, ANSWER = 0, 1, 2  # roles of a token to be predicted; ANSWER + i for the answers of KINDS[i]


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        steps: optimiser steps.
        length: tokens of a sequence.
        batch: sequences a step.
        mix: shares of the sequences: repeated random tokens, and facts of each of `KINDS`.
        facts: a sequence holds 1 to this many facts, fewer where they do not fit.
    """

    steps: int
    length: int
    batch: int
    mix: tuple[float, float, float, float] = (0.0, 0.5, 0.25, 0.25)
    facts: int = 16


RECIPE = loop.Recipe(
    stages=(
        Stage(600, length=64, batch=64, mix=(0.5, 0.5, 0.0, 0.0)),
        Stage(721, length=64, batch=64, mix=(0.1, 0.6, 0.15, 0.15)),
        Stage(1180, length=128, batch=32, mix=(0.05, 0.55, 0.2, 0.2)),
        Stage(400, length=256, batch=16, mix=(0.0, 0.6, 0.2, 0.2)),
        Stage(600, length=512, batch=8, mix=(0.0, 0.6, 0.2, 0.2)),
        Stage(10, length=1024, batch=4, mix=(0.0, 0.6, 0.2, 0.2)),
        Stage(1990, length=1024, batch=4, mix=(0.0, 0.4, 0.2, 0.4)),
    ),
    lr=2e-3,
    warmup=100,
    decay=0.25,
)


def tokenizer() -> Any:
    """Train the tokenizer: byte-level BPE on the training text; every digit and every key of recall is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]{1,4}|\s*\n|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(recall.KEYS),
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(docs.documents("train"), trainer)
    backend.add_tokens([AddedToken(f" {key}", normalized=False) for key in recall.KEYS])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(seed: int = 0, **sizes: int) -> nn.Module:
    """An untrained ``LlamaForCausalLM``: 4 layers of width 256, 8 query heads share 4 key and value heads.

    Args:
        seed: of the weights.
        sizes: other entries of the config.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
    }
    config |= sizes
    model = LlamaForCausalLM(
        LlamaConfig(
            **config,
            max_position_embeddings=CONTEXT,
            # Llama 3's: half of a head's 16 frequencies stay put over 1,024 tokens, with 10,000 only a quarter does
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for block in model.model.layers:  # the residual stream keeps its scale
        for out in (block.self_attn.o_proj, block.mlp.down_proj):
            with torch.no_grad():
                out.weight /= (2 * config["num_hidden_layers"]) ** 0.5
    return model


def repeats(words: recall.Vocabulary, rng: np.random.Generator, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, repeated: nothing but induction predicts the second time.

    Every other row draws from an alphabet of digits and a few keys, where one token of context does not suffice.

    Args:
        words: the tokens of statements.
        rng: source of chance.
        n: rows.
        length: tokens of each, BOS included.

    Returns:
        ids int64 [n, length], without BOS at position 0 (left to the caller), and roles, same shape.
    """
    period = int(rng.integers(length // 4, length // 2 + 1))
    anything = torch.from_numpy(rng.integers(3, len(words.stops), size=(n, period)))
    few = torch.cat([words.values.unique(), words.keys[torch.from_numpy(rng.permutation(len(words.keys))[:6])]])
    limited = few[torch.from_numpy(rng.integers(len(few), size=(n, period)))]
    segment = torch.where(torch.arange(n)[:, None] % 2 == 0, anything, limited)
    ids = segment[:, (torch.arange(length) - 1) % period]
    role = torch.where(torch.arange(length) > period, TEXT, IGNORED).expand(n, -1)
    return ids, role


def asked(
    tokenizer: Any, rng: np.random.Generator, kind: str, n: int, length: int, facts: int, split: str = "train"
) -> tuple[Tensor, Tensor]:
    """Text with facts, and behind it all questions with their answers, in random order.

    Args:
        tokenizer: of the model.
        rng: source of chance.
        kind: one of `KINDS`.
        n: rows.
        length: tokens of each, BOS included.
        facts: at most this many a row.
        split: of the text.

    Returns:
        ids int64 [n, length] and roles, same shape.
    """
    words, noun = recall.vocabulary(tokenizer), recall.NOUN[kind]
    told, may_ask = recall.facts(tokenizer, rng, kind, 1, 1, split)  # one, to see what a fact costs
    stop = len(words.stop)
    each = sum(recall.statement(words, noun, *fact)[0].shape[1] for fact in told)
    reply = len(words.ask[noun]) + 1 + may_ask[0][1].shape[1] + stop
    room = max(1, int(0.8 * length) // (each + reply))  # text fills at least a fifth
    k = int(rng.integers(1, min(facts, room) + 1))
    context, of, may_ask = recall.compose(tokenizer, rng, kind, n, length - k * reply, k, split)
    ids, role = [], []
    for key, answer in may_ask:
        ids.append(torch.cat([recall.question(words, noun, key), answer, words.stop.expand(n, -1)], dim=1))
    is_answer = torch.arange(reply) >= reply - stop - answer.shape[1]  # with its full stop, so that generation ends
    order = recall.choose(rng, n, k, k)[:, :, None].expand(-1, -1, reply)
    questions = torch.stack(ids, dim=1).gather(1, order).flatten(1)
    role = torch.where(is_answer, ANSWER + KINDS.index(kind), IGNORED).repeat(k).expand(n, -1)
    planted = torch.where(of == -1, TEXT, IGNORED)  # keys and values cannot be foretold
    planted[:, 0] = IGNORED
    return torch.cat([context, questions], dim=1), torch.cat([planted, role], dim=1)


def grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention without padding, as transformers calls it, made for training on a CPU in bfloat16.

    The heads that share keys are one matrix product, over blocks of queries that fit the processor's cache and see only
    the keys up to their end. Forward and backward together took 28, 52 and 99 ms for 4,096 tokens in sequences of 256,
    512 and 1,024; torch's own attention took 77, 129 and 146 ms.

    Args:
        module: ignored.
        query: [b, h, n, d].
        key, value: [b, g, n, d].
        attention_mask: ignored, nothing is padded.
        scaling: of the scores.

    Returns:
        [b, n, h, d], and None for the weights.
    """
    b, h, n, d = query.shape
    g = key.shape[1]
    query = (query * scaling).view(b, g, h // g, n, d)
    hidden = query.new_full((n, n), float("-inf")).triu(1)
    blocks = []
    for begin in range(0, n, BLOCK):
        end = min(n, begin + BLOCK)
        scores = query[:, :, :, begin:end].flatten(2, 3) @ key[:, :, :end].mT  # b g h/g*block end
        weights = (scores.view(b, g, h // g, -1, end) + hidden[begin:end, :end]).softmax(-1)
        blocks.append((weights.flatten(2, 3) @ value[:, :, :end]).view(b, h, -1, d))
    return torch.cat(blocks, dim=2).transpose(1, 2), None


class Trainer(loop.Trainer):
    """Text and recall in one loss: the mean over text plus the mean over answers.

    Args:
        model: a ``LlamaForCausalLM``.
        tokenizer: of the model.
        recipe: the run, with stages of this module.
        device: "cpu" or "cuda".
        bf16: whether the forward pass runs under bfloat16 autocast.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, recipe: loop.Recipe, device: str = "cpu", bf16: bool = True
    ) -> None:
        from transformers import AttentionInterface

        super().__init__(model, recipe, device, bf16)
        self.tokenizer = tokenizer
        AttentionInterface.register("grouped", grouped)
        model.set_attn_implementation("grouped")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sequences of a step.

        Args:
            step: 0 .. steps - 1.

        Returns:
            ids int64 [b, length] and roles, same shape.
        """
        stage, _ = self.recipe.stage(step)
        rng = np.random.default_rng([self.recipe.seed, step])
        counts = rng.multinomial(stage.batch, np.array(stage.mix) / sum(stage.mix))
        parts = []
        if counts[0]:
            ids, role = repeats(recall.vocabulary(self.tokenizer), rng, int(counts[0]), stage.length)
            ids[:, 0] = docs.first_token(self.tokenizer)
            parts.append((ids, role))
        for kind, n in zip(KINDS, counts[1:], strict=True):
            if n:
                parts.append(asked(self.tokenizer, rng, kind, int(n), stage.length, stage.facts))
        ids, roles = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(roles)

    def loss(self, ids: Tensor, role: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """Mean cross-entropy of text plus that of answers; for the log the former, and how many answers are right.

        Args:
            ids: int64 [b, length].
            role: int64 [b, length], of each token as one to be predicted.
        """
        role, target = role[:, 1:].flatten(), ids[:, 1:].flatten()
        used = (role != IGNORED).nonzero()[:, 0]
        role, target = role[used], target[used]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            # index_select, for the gradient of hidden[used] takes seconds on a CPU
            logits = self.model.lm_head(hidden.index_select(0, used)).float()
        each = F.cross_entropy(logits, target, reduction="none")
        answer = role >= ANSWER
        text = each[~answer].mean()
        loss = text + each[answer].mean() if answer.any() else text
        right = (logits.detach().argmax(-1) == target).float()
        shares = [right[role == ANSWER + i].mean().item() for i in range(len(KINDS))]  # nan where there are none
        return loss, (text.item(), *shares)

    def describe(self, numbers: Sequence[float]) -> str:
        """A line of the log."""
        stage, _ = self.recipe.stage(self.step - 1)
        loss, text, *shares = numbers
        told = " ".join(f"{kind} {share:.3f}" for kind, share in zip(KINDS, shares, strict=True))
        return f"length {stage.length} loss {loss:.3f} text {text:.3f} tokens right: {told}"


class Bigram:
    """Probability of a token given the one before: absolute discounting, interpolated with single tokens.

    Args:
        stream: int64 [tokens], the training text.
        size: of the vocabulary.
        discount: taken off every count.

    Source: Ney, Essen and Kneser, On structuring probabilistic dependences in stochastic language modelling, 1994.
    """

    def __init__(self, stream: Tensor, size: int, discount: float = 0.75) -> None:
        pairs = torch.zeros(size * size).index_add_(0, stream[:-1] * size + stream[1:], torch.ones(len(stream) - 1))
        pairs = pairs.view(size, size)
        single = (torch.bincount(stream, minlength=size) + 1.0) / (len(stream) + size)
        total = pairs.sum(1, keepdim=True)
        freed = torch.where(total > 0, discount * (pairs > 0).sum(1, keepdim=True) / total, 1.0)
        self.probability = (pairs - discount).clamp_min(0) / total.clamp_min(1) + freed * single  # before, after

    def loss(self, ids: Tensor) -> float:
        """Mean negative log-likelihood in nats of the tokens from the third on, given the one before each.

        Args:
            ids: int64 [n, length], BOS at position 0.
        """
        return -self.probability[ids[:, 1:-1], ids[:, 2:]].log().mean().item()


@torch.inference_mode()
def text_loss(model: nn.Module, ids: Tensor, batch: int = 8) -> float:
    """Mean negative log-likelihood in nats of the tokens from the third on.

    Args:
        model: a causal language model on the CPU.
        ids: int64 [n, length], BOS at position 0.
        batch: sequences a pass.
    """
    each = [
        F.cross_entropy(model(part, use_cache=False).logits[:, 1:-1].flatten(0, 1), part[:, 2:].flatten()) * len(part)
        for part in ids.split(batch)
    ]
    return (torch.stack(each).sum() / len(ids)).item()


def measure(model: nn.Module, tokenizer: Any, n: int, seed: int, length: int = 1024) -> dict[str, Any]:
    """What the card says about a model: recall of every kind, and held-out text beside a bigram model.

    Args:
        model: on the CPU, in eval mode.
        tokenizer: of the model.
        n: questions of each kind.
        seed: of the sample.
        length: tokens of a context.

    Returns:
        Entries of the card.
    """
    right = {
        kind: recall.accuracy(model, recall.sample(tokenizer, kind, n, length, seed)).sum().item()
        for kind in recall.KINDS
    }
    ids = docs.text(tokenizer, 64, length, seed)
    count = ids[:, 2:].numel()
    losses = {
        "model": text_loss(model, ids),
        "bigram": Bigram(docs.tokens(tokenizer, "train"), len(tokenizer)).loss(ids),
    }
    shares = {kind: loop.proportion(count, n) for kind, count in right.items()}
    return {
        "accuracy": shares["needles"] | {"kind": "needles: one of four is asked for; the whole answer, greedy"},
        "recall": shares,
        "recall_sample": f"keeprate.tasks.recall.sample(tokenizer, kind, n={n}, length={length}, seed={seed})",
        "text": {
            "nats_a_token": {name: round(loss, 4) for name, loss in losses.items()},
            "perplexity": {name: round(float(np.exp(loss)), 2) for name, loss in losses.items()},
            "characters_a_token": round(sum(map(len, tokenizer.batch_decode(ids[:, 2:]))) / count, 3),
            "tokens": count,
            "sample": f"keeprate.tasks.docs.text(tokenizer, n=64, length={length}, seed={seed}), but 2 first tokens",
        },
    }


def main(
    name: str,
    recipe: loop.Recipe,
    build: Callable[[], nn.Module],
    words: Callable[[], Any],
    notes: dict[str, Any] | None = None,
) -> None:
    """The command line: train or resume, measure, publish.

    Args:
        name: of the model; its folder is ``data/models/<name>`` unless ``--out`` says otherwise.
        recipe: of the run.
        build: returns the model before training.
        words: returns the tokenizer.
        notes: further entries of the card.
    """
    from transformers import AutoTokenizer

    options = loop.options(name)
    options.add_argument("--fp32", action="store_true", help="no bfloat16, for processors that are slow at it")
    options.add_argument("--n", type=int, default=512, help="questions of each kind that are measured")
    options.add_argument("--seed", type=int, default=2026, help="of the sample that is measured")
    given = options.parse_args()

    torch.set_num_threads(given.threads)
    folder, checkpoint = given.work / f"{name}-tokenizer", given.work / f"{name}.safetensors"
    if not (folder / "tokenizer.json").is_file():
        words().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build()
    trainer = Trainer(model, tokenizer, recipe, given.device, not given.fp32)
    if given.interim:
        trainer.restore(checkpoint)
    else:
        trainer.run(checkpoint)
    model.load_state_dict(trainer.averaged())
    model.set_attn_implementation("sdpa")
    model.cpu().eval()
    facts = {
        "name": name,
        "task": "recall",
        "status": "final" if trainer.step == recipe.steps else f"interim: step {trainer.step} of {recipe.steps}",
        "train_command": f"python -m keeprate.train.{name.replace('-', '_')} --out data/models/{name}",
        "data": {
            "recipe": "keeprate.tasks.docs and keeprate.tasks.recall: docstrings of the installed packages and "
            "Python's help topics, with facts written into them and asked for behind them; measured on subpackages and "
            "topics that training leaves out",
            "held_out": list(docs.HELD_OUT),
            "train": docs.fingerprint("train"),
            "test": docs.fingerprint("test"),
            "train_tokens": len(docs.tokens(tokenizer, "train")),
        },
    }
    facts |= measure(model, tokenizer, given.n, given.seed)
    card = loop.publish(model, given.out, recipe, trainer, facts | (notes or {}), tokenizer.save_pretrained)
    if trainer.step == recipe.steps:
        checkpoint.unlink()
    print(json.dumps({key: card[key] for key in ("status", "recall", "text", "minutes", "params")}, indent=1))


if __name__ == "__main__":
    main("llama-docs", RECIPE, lambda: build(RECIPE.seed), tokenizer)
