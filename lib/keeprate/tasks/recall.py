"""Recall written into reference text: which cached tokens hold the answer is known.

Statements such as " Note the code: kiwi 471." are planted between the sentences of held-out documentation. The
question behind it, " What is the code? kiwi", ends with the key, and the answer is what stood behind that key. So the
task measures whether a cache still holds the key and its value, and nothing else.

`needle` plants one statement, `needles` four, of which one is asked for. `variables` plants two chains of two
(" Note the value: kiwi 471.", later " Note the value: plum kiwi."); asked for plum, the answer follows the
chain: " kiwi 471". `copy` plants a short passage of other reference text behind its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keeprate import check
from keeprate.tasks import docs

KINDS = ("needle", "needles", "variables", "copy")
NEEDLES = 4  # statements of a `needles` sample, the asked one included
PASSAGE = 8  # tokens of the passage of a `copy` sample
NOUN = {"needle": "code", "needles": "code", "variables": "value", "copy": "passage"}
# Words that reference text hardly knows; each is one token of llama-docs, with its leading space.
KEYS = tuple(
    """
    kiwi plum peach mango lemon cherry melon papaya banana walnut almond raisin ginger pepper garlic onion carrot
    potato tomato pumpkin spinach lettuce celery radish otter badger tiger zebra panda koala lizard turtle rabbit
    squirrel hedgehog beaver donkey pigeon sparrow raven eagle penguin dolphin salmon lobster spider butterfly
    cricket violin trumpet guitar piano flute drummer kettle teapot pillow blanket cushion candle lantern ladder
    hammer basket
    """.split()  # noqa: SIM905
)
VALUES = range(100, 1000)


@dataclass(frozen=True)
class Recall:
    """A sample of recall questions.

    Attributes:
        kind: one of `KINDS`.
        context: int64 [n, length], starts with BOS; everything up to, not including, the question.
        question: int64 [n, m]; its last token is the key.
        answer: int64 [n, a].
        truth: bool [n, length], the context tokens that hold the answer: key and value of the asked statement, and for
            `variables` of both statements of the chain.
        distractors: bool [n, length], keys and values of the other statements.
    """

    kind: str
    context: Tensor
    question: Tensor
    answer: Tensor
    truth: Tensor
    distractors: Tensor

    def __len__(self) -> int:
        return len(self.context)

    @property
    def prompt(self) -> Tensor:
        """Context and question, int64 [n, length + m]."""
        return torch.cat([self.context, self.question], dim=1)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that statements and questions are made of.

    Attributes:
        keys: int64 [keys], one token each.
        values: int64 [values, a], numbers as text.
        note: tokens before the key of a statement, by noun.
        ask: tokens before the key of a question, by noun.
        stop: tokens behind a value.
        stops: bool [vocabulary], tokens that end with a full stop.
        spaced: bool [vocabulary], tokens that begin with a space or a line end.
        breaks: bool [vocabulary], tokens that hold an empty line.
    """

    keys: Tensor
    values: Tensor
    note: dict[str, Tensor]
    ask: dict[str, Tensor]
    stop: Tensor
    stops: Tensor
    spaced: Tensor
    breaks: Tensor

    def boundary(self, text: Tensor) -> Tensor:
        """Where a sentence or a paragraph ends.

        Args:
            text: int64 [n, length].

        Returns:
            bool [n, length], true at the last token of each.
        """
        following = torch.cat([self.spaced[text[:, 1:]], torch.ones_like(text[:, :1], dtype=torch.bool)], dim=1)
        return self.breaks[text] | (self.stops[text] & following)


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Any) -> Vocabulary:
    """The pieces of statements as tokens of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        The pieces.

    Raises:
        ValueError: Fewer than eight of `KEYS` are single tokens.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    keys = [found[0] for key in KEYS if len(found := ids(f" {key}")) == 1]
    if len(keys) < 8:
        raise ValueError(f"only {len(keys)} of the {len(KEYS)} keys are single tokens of this tokenizer; needed: 8")
    values = [ids(f" {value}") for value in VALUES]
    width = np.bincount([len(value) for value in values]).argmax()  # the commonest length
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    nouns = sorted(set(NOUN.values()))
    return Vocabulary(
        torch.tensor(keys),
        torch.tensor([value for value in values if len(value) == width]),
        {noun: torch.tensor(ids(f" Note the {noun}:")) for noun in nouns},
        {noun: torch.tensor(ids(f" What is the {noun}?")) for noun in nouns},
        torch.tensor(ids(".")),
        torch.tensor([piece.endswith(".") for piece in pieces]),
        torch.tensor([piece.startswith((" ", "\n")) for piece in pieces]),
        torch.tensor(["\n\n" in piece for piece in pieces]),
    )


def choose(rng: np.random.Generator, n: int, k: int, among: int) -> Tensor:
    """Distinct random numbers in every row.

    Args:
        rng: source of chance.
        n: rows.
        k: numbers in each.
        among: they lie in 0 .. among - 1.

    Returns:
        int64 [n, k].
    """
    return torch.from_numpy(rng.random((n, among)).argsort(axis=1)[:, :k].copy())


def cuts(rng: np.random.Generator, boundary: Tensor, k: int) -> Tensor:
    """Where statements go: random depths, each moved on to the next end of a sentence or paragraph.

    Args:
        rng: source of chance.
        boundary: bool [n, length], the tokens of the text behind which statements may stand.
        k: statements.

    Returns:
        int64 [n, k], ascending: a statement goes behind the token with this index.
    """
    n, length = boundary.shape
    depth = torch.from_numpy(np.sort(rng.integers(length, size=(n, k)), axis=1))
    end = torch.where(boundary, torch.arange(length), length)
    following = end.flip(1).cummin(1).values.flip(1).gather(1, depth)  # n k
    return torch.where(following < length, following, depth)


def plant(text: Tensor, statements: Sequence[Tensor], cut: Tensor) -> tuple[Tensor, Tensor]:
    """Insert statements into text.

    Args:
        text: int64 [n, length].
        statements: k tensors, int64 [n, w_j].
        cut: int64 [n, k], statement j goes behind the text token with this index.

    Returns:
        The merged tokens, int64 [n, length + sum of w_j]; and where each came from, same shape: the column among the
        statements laid side by side, or -1 for text.
    """
    n, length = text.shape
    inserted = torch.cat(list(statements), dim=1)  # n s
    owner = torch.repeat_interleave(torch.tensor([part.shape[1] for part in statements]))  # s
    place = torch.cat([2 * torch.arange(length).expand(n, -1), 2 * cut[:, owner] + 1], dim=1)
    order = place.argsort(dim=1, stable=True)
    origin = torch.cat([torch.full((n, length), -1), torch.arange(inserted.shape[1]).expand(n, -1)], dim=1)
    return torch.cat([text, inserted], dim=1).gather(1, order), origin.gather(1, order)


def statement(words: Vocabulary, noun: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A statement for every row.

    Args:
        words: the tokens of its pieces.
        noun: what is to be noted.
        key: int64 [n].
        value: int64 [n, a].

    Returns:
        int64 [n, w]; and bool [w], the columns of key and value.
    """
    n = len(key)
    before, behind = words.note[noun].expand(n, -1), words.stop.expand(n, -1)
    row = torch.cat([before, key[:, None], value, behind], dim=1)
    column = torch.arange(row.shape[1])
    return row, (column >= before.shape[1]) & (column < row.shape[1] - behind.shape[1])


def question(words: Vocabulary, noun: str, key: Tensor) -> Tensor:
    """A question for every row.

    Args:
        words: the tokens of its pieces.
        noun: what is asked for.
        key: int64 [n].

    Returns:
        int64 [n, m], the key last.
    """
    return torch.cat([words.ask[noun].expand(len(key), -1), key[:, None]], dim=1)


def facts(
    tokenizer: Any, rng: np.random.Generator, kind: str, n: int, k: int, split: str
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """What is planted and what may be asked.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rng: source of chance.
        kind: one of `KINDS`.
        n: rows.
        k: facts in each: statements, for `variables` chains of two statements.
        split: of the text that passages come from.

    Returns:
        Statements as (key [n], value [n, a]), fact by fact, a chain's source before its alias; and for each fact the
        (key [n], answer [n, a]) that may be asked.
    """
    words = vocabulary(tokenizer)
    chain = kind == "variables"
    keys = words.keys[choose(rng, n, k * (1 + chain), len(words.keys))]  # n k or 2k
    if kind == "copy":
        values = docs.windows(tokenizer, rng, n * k, PASSAGE, split).unflatten(0, (n, k))
    else:
        values = words.values[choose(rng, n, k, len(words.values))]  # n k a
    told = [(keys[:, i], values[:, i]) for i in range(k)]
    if not chain:
        return told, told
    aliases = [(keys[:, k + i], keys[:, i, None]) for i in range(k)]
    asked = [(keys[:, k + i], torch.cat([keys[:, i, None], values[:, i]], dim=1)) for i in range(k)]
    return [one for pair in zip(told, aliases, strict=True) for one in pair], asked


def compose(
    tokenizer: Any, rng: np.random.Generator, kind: str, n: int, length: int, k: int, split: str
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Contexts with facts planted in them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rng: source of chance.
        kind: one of `KINDS`.
        n: rows.
        length: tokens of each, BOS included.
        k: facts in each.
        split: of the text.

    Returns:
        Context int64 [n, length]; for each token the fact whose key or value it belongs to, -1 for text, -2 for the
        other words of a statement, int64 [n, length]; for each fact the (key, answer) that may be asked.

    Raises:
        ValueError: ``length`` leaves no text between the statements.
    """
    words, noun = vocabulary(tokenizer), NOUN[kind]
    told, asked = facts(tokenizer, rng, kind, n, k, split)
    statements = [statement(words, noun, *fact) for fact in told]
    room = length - 1 - sum(row.shape[1] for row, _ in statements)
    if room < 1:
        raise ValueError(f"length={length} of kind {kind!r}; allowed: at least {length - room + 1}, for its statements")
    text = docs.windows(tokenizer, rng, n, room, split)
    # facts at random depths; within one, the earlier place is its source's
    each = len(told) // k
    shuffled = choose(rng, n, len(told), len(told))
    place = cuts(rng, words.boundary(text), len(told)).gather(
        1, shuffled.unflatten(1, (k, each)).sort(2).values.flatten(1)
    )
    merged, origin = plant(text, [row for row, _ in statements], place)
    of = torch.cat([torch.where(core, i // each, -2) for i, (_, core) in enumerate(statements)] + [torch.tensor([-1])])
    bos = torch.full((n, 1), docs.first_token(tokenizer))
    return torch.cat([bos, merged], dim=1), torch.cat([torch.full((n, 1), -1), of[origin]], dim=1), asked


def sample(tokenizer: Any, kind: str, n: int = 32, length: int = 1024, seed: int = 0, split: str = "test") -> Recall:
    """Draw a sample.

    Args:
        tokenizer: a Hugging Face tokenizer, such as ``kr.load("llama-docs").processor``.
        kind: one of `KINDS`.
        n: number of questions, each with its own context.
        length: tokens of a context.
        seed: decides text, keys, values and depths.
        split: of the text; "test" was not trained on.

    Returns:
        The sample.

    Raises:
        ValueError: Unknown kind or split, ``n`` below 1, a ``length`` that leaves no text between the statements, a
            tokenizer whose tokens do not suit.
    """
    check.choice("kind", kind, KINDS)
    check.choice("split", split, docs.SPLITS)
    check.whole("n", n), check.whole("length", length)
    rng = np.random.default_rng([seed, KINDS.index(kind), docs.SPLITS.index(split)])
    k = {"needle": 1, "needles": NEEDLES, "variables": 2, "copy": 1}[kind]
    context, of, asked = compose(tokenizer, rng, kind, n, length, k, split)
    key, answer = asked[0]
    return Recall(kind, context, question(vocabulary(tokenizer), NOUN[kind], key), answer, of == 0, of > 0)


@torch.inference_mode()
def accuracy(model: nn.Module, drawn: Recall, batch: int = 16) -> Tensor:
    """Which answers greedy decoding gets wholly right.

    One pass over context, question and answer: the greedy answer is right if and only if every token of the true
    answer is the likeliest one behind those before it.

    Args:
        model: a causal language model of transformers.
        drawn: the sample.
        batch: questions a pass.

    Returns:
        bool [n].
    """
    check.whole("batch", batch)
    device, right = next(model.parameters()).device, []
    for prompt, answer in zip(drawn.prompt.split(batch), drawn.answer.split(batch), strict=True):
        ids = torch.cat([prompt, answer], dim=1).to(device)
        a = answer.shape[1]
        logits = model(ids, use_cache=False, logits_to_keep=a + 1).logits[:, :-1]  # b a v
        right.append((logits.argmax(-1).cpu() == answer).all(1))
    return torch.cat(right)


def show(tokenizer: Any, drawn: Recall, row: int = 0, around: int = 12) -> str:
    """One question as text: its statements with the words around them, question and answer.

    Args:
        tokenizer: the one that the sample was drawn with.
        drawn: the sample.
        row: which question.
        around: tokens shown on both sides of a statement.

    Returns:
        Text; ">>" and "<<" enclose what holds the answer, "(" and ")" the other keys and values.

    Raises:
        ValueError: No such row.
    """
    if not 0 <= row < len(drawn):
        raise ValueError(f"row={row}; allowed: 0 to {len(drawn) - 1}")
    mark = (drawn.truth[row].int() + 2 * drawn.distractors[row].int()).tolist()
    ids, length = drawn.context[row].tolist(), drawn.context.shape[1]
    runs = [i for i in range(length + 1) if i in (0, length) or mark[i] != mark[i - 1]]
    lines = []
    for begin, end in pairwise(runs):
        text = tokenizer.decode(ids[begin:end])
        if mark[begin]:
            opening, closing = ((" >>", " <<"), (" (", " )"))[mark[begin] - 1]
            text = opening + text + closing
        elif end - begin > 2 * around:
            head = tokenizer.decode(ids[begin : begin + around]) if begin else ""
            text = f"{head} [... {end - begin - 2 * around} tokens ...] {tokenizer.decode(ids[end - around : end])}"
        lines.append(text)
    asked, answer = tokenizer.decode(drawn.question[row]), tokenizer.decode(drawn.answer[row])
    return "".join(lines) + f"\n{asked.strip()} ->{answer}"
