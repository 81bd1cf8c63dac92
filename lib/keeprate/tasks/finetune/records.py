"""Rows of the fine-tuning tasks: their tokens, labels, and which targets are to be learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from keeprate import check
from keeprate.tasks import docs, recall

if TYPE_CHECKING:  # read only where it is asked for: `datasets` is slow to import and not installed everywhere
    from datasets import Dataset

KINDS = ("arithmetic", "tools", "numbers", "documents")
SPLITS = ("train", "reference", "test")
IGNORED = -100  # label of a token that is no target, as everywhere in transformers
GROUPS = {  # of target tokens; what is to be learned comes last
    "arithmetic": ("noisy", "clean"),
    "tools": ("boilerplate", "content"),
    "numbers": ("text", "numeric"),
    "documents": ("noisy", "clean"),
}
NOISE = {"arithmetic": 0.4, "documents": 0.4}  # share of answers, of tokens; the other two have none


@dataclass(frozen=True)
class Recipe:
    """A short training of ``llama-docs-draft`` in which the choice of tokens decides what is learned.

    Attributes:
        lr: peak learning rate of AdamW, falling to zero along a line.
        steps: optimiser steps.
        warmup: steps over which the rate rises to its peak.
        batch: rows a step.
        rows: different rows to draw for it.
    """

    lr: float
    steps: int
    warmup: int = 10
    batch: int = 16
    rows: int = 2048


# The shortest found in which plain SFT learns (documents: only from rows without noise) and the true mask clearly beats
# it: 3 to 5 s of one CPU thread. Scores of llama-docs-draft, means over seeds 0 to 4, 128 test rows, 2026-11-21
# (share right; numbers: absolute error, documents: nats a token):
#               before    SFT   true mask   SFT on rows without noise
#   arithmetic   0.00    0.31     0.86        0.94
#   tools        0.00    0.51     0.93         -
#   numbers     28.56    9.65     5.41         -
#   documents    3.574   3.975    3.555       3.431
RECIPES = {
    "arithmetic": Recipe(lr=5e-3, steps=70),
    "tools": Recipe(lr=3e-3, steps=60, batch=8),
    "numbers": Recipe(lr=5e-3, steps=90),
    "documents": Recipe(lr=1e-3, steps=60),
}

WORDS = ("zero", *"one two three four five six seven eight nine ten eleven twelve".split())  # noqa: SIM905
TERMS = 6  # largest number that is added in `arithmetic`
SUMS = 3  # questions a row of `arithmetic`
REQUESTS = {  # tool: how it is asked for; {item} and {day} are what it is called with
    "get_price": ("what does {item} cost on day {day}?", "the price of {item} for day {day}?"),
    "get_place": ("where is {item} on day {day}?", "in which hall is {item} on day {day}?"),
    "get_stock": ("how much {item} is left on day {day}?", "is there {item} on day {day}?"),
    "set_price": ("sell {item} for less from day {day} on.", "make {item} cheaper on day {day}."),
    "set_place": ("move {item} to another hall on day {day}.", "put {item} away on day {day}."),
    "set_stock": ("order more {item} for day {day}.", "add {item} to the store on day {day}."),
}
PHRASES = (
    "I need to look this up.",
    "Let me check that for you.",
    "Of course, I can do this.",
    "One moment please.",
    "This is a question about the store.",
    "I will call the right tool now.",
    "The user wants to know something.",
    "To answer, I use a tool.",
    "Sure, here is the call.",
    "First I find the entry in the table.",
    "This needs the data base.",
    "Let us see what the system says.",
)
RECORDS, NOTE = 2, 10  # records a row of `numbers`; tokens of unrelated text in each
LENGTH, STRETCH = 48, 4  # tokens of a row of `documents`; of a stretch that is noise or not
BLOCK, BLOCKS = 512, 8  # the text is cut into blocks: one in eight is for test, one for reference, six for training

Piece = tuple[Sequence[int], int, int]  # tokens, their group (-1: no target), number of their answer (-1: none)


@dataclass(frozen=True)
class Records:
    """Rows to fine-tune on or to be measured with, padded on the right.

    Attributes:
        kind: one of `KINDS`.
        input_ids: int64 [n, length].
        attention_mask: int64 [n, length], 0 at padding.
        labels: int64 [n, length], the tokens themselves, `IGNORED` where no target is.
        group: int64 [n, length], index into ``GROUPS[kind]``; -1 where no target is.
        answer: int64 [n, length], to which answer of the row a token belongs; -1 for none.
        names: of the two groups.
    """

    kind: str
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    group: Tensor
    answer: Tensor
    names: tuple[str, str]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def truth(self) -> Tensor:
        """bool [n, length], the target tokens to learn from."""
        return self.group == 1

    @property
    def share(self) -> float:
        """Share of target tokens that are to be learned from."""
        return (self.truth.sum() / (self.group >= 0).sum()).item()

    def replaced(self, **fields: Tensor) -> Records:
        """The same rows with other tokens or groups; labels follow."""
        new = replace(self, **fields)
        return replace(new, labels=new.input_ids.where(new.group >= 0, IGNORED))

    def rows(self, **columns: Tensor) -> list[dict[str, list]]:
        """The rows one by one, without padding, as `keeprate.sft.Collator` takes them.

        Args:
            **columns: further numbers a token, [n, length] each, such as ``weights``.

        Returns:
            Rows with input_ids, labels, group and the columns given.

        Raises:
            ValueError: A column of another shape.
        """
        for name, values in columns.items():
            if values.shape != self.input_ids.shape:
                raise ValueError(
                    f"column {name!r} must have the shape {[*self.input_ids.shape]}; got {[*values.shape]}"
                )
        told = {"input_ids": self.input_ids, "labels": self.labels, "group": self.group} | columns
        lists = {name: values.tolist() for name, values in told.items()}
        lengths = self.attention_mask.sum(1).tolist()
        return [{name: values[i][:length] for name, values in lists.items()} for i, length in enumerate(lengths)]

    def dataset(self, **columns: Tensor) -> Dataset:
        """`rows` as a `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset.from_list(self.rows(**columns))


@lru_cache(maxsize=8)
def _encoder(tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    """Text to tokens, each text only once."""

    @lru_cache(maxsize=4096)
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


@lru_cache(maxsize=8)
def digits(tokenizer: Any) -> Tensor:
    """The value of every token that is a digit.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        int64 [vocabulary], 0 to 9, with or without a space before the digit; -1 for other tokens.

    Raises:
        ValueError: The tokenizer does not write numbers digit by digit.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    single = [text.strip() for text in texts]
    values = torch.tensor(
        [int(text) if text.isascii() and text.isdecimal() and len(text) == 1 else -1 for text in single]
    )
    if (values[list(_encoder(tokenizer)(" 47"))] >= 0).sum() != 2:
        raise ValueError("the tokenizer must write ' 47' with one token for each digit; this one does not")
    return values


@lru_cache(maxsize=8)
def _text(tokenizer: Any, split: str) -> Tensor:
    """The blocks of reference text that belong to a split, int64 [blocks, BLOCK]."""
    stream = docs.tokens(tokenizer, "test")
    blocks = stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)
    part = torch.arange(len(blocks)) % BLOCKS
    return blocks[{"test": part == 0, "reference": part == 1, "train": part > 1}[split]]


def _stretches(tokenizer: Any, rng: np.random.Generator, n: int, length: int, split: str) -> Tensor:
    """Random stretches of a split's text, none across the end of a block: int64 [n, length]."""
    blocks = _text(tokenizer, split)
    row, start = (torch.from_numpy(rng.integers(high, size=n)) for high in (len(blocks), BLOCK - length + 1))
    return blocks[row[:, None], start[:, None] + torch.arange(length)]


def pad(tokenizer: Any, kind: str, rows: list[list[Piece]], names: tuple[str, str]) -> Records:
    """Rows of pieces, each behind a first token, as tensors.

    Args:
        tokenizer: for its first and padding tokens.
        kind: of the task.
        rows: for every row its pieces.
        names: of the groups.
    """
    bos = ((docs.first_token(tokenizer),), -1, -1)
    flat = [piece for row in rows for piece in (bos, *row)]
    width = np.array([len(tokens) for tokens, _, _ in flat])
    each = np.array([sum(len(tokens) for tokens, _, _ in row) + 1 for row in rows])
    there = torch.from_numpy(np.arange(each.max()) < each[:, None])

    def spread(values: np.ndarray, empty: int) -> Tensor:
        return torch.full(there.shape, empty).masked_scatter(there, torch.from_numpy(values))

    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else bos[0][0]
    ids = spread(np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens, _, _ in flat]), fill)
    group, answer = (spread(np.repeat([piece[i] for piece in flat], width), -1) for i in (1, 2))
    return Records(kind, ids, there.long(), ids.where(group >= 0, IGNORED), group, answer, names)


def _arithmetic(tokenizer: Any, rng: np.random.Generator, n: int, split: str, noise: float) -> Records:
    """Sums of two numbers up to `TERMS`; a wrong answer is any other sum, each with the same chance."""
    encode = _encoder(tokenizer)
    a, b = rng.integers(1, TERMS + 1, size=(2, n, SUMS))
    wrong = rng.random((n, SUMS)) < noise
    many = 2 * TERMS - 1  # different sums, from 2 on
    told = np.where(wrong, (a + b - 2 + rng.integers(1, many, size=(n, SUMS))) % many + 2, a + b)
    return pad(
        tokenizer,
        "arithmetic",
        [
            [
                piece
                for i in range(SUMS)
                for piece in (
                    (encode(f" {WORDS[a[row, i]]} plus {WORDS[b[row, i]]} is"), -1, -1),
                    (encode(f" {WORDS[told[row, i]]}."), int(not wrong[row, i]), i),
                )
            ]
            for row in range(n)
        ],
        GROUPS["arithmetic"],
    )


def _tools(tokenizer: Any, rng: np.random.Generator, n: int, split: str, noise: float) -> Records:
    """Which tool, with which of the two items named and which day; the answer is all three."""
    encode, names = _encoder(tokenizer), list(REQUESTS)
    rows = []
    for _ in range(n):
        name = names[rng.integers(len(names))]
        other, item = (recall.KEYS[i] for i in rng.choice(len(recall.KEYS), 2, replace=False))
        day, phrase = rng.integers(1, 10), PHRASES[rng.integers(len(PHRASES))]
        asked = REQUESTS[name][rng.integers(len(REQUESTS[name]))].format(item=item, day=day)
        rows.append(
            [
                (encode(f"User: not {other}, but {item}: {asked}\n"), -1, -1),
                (encode(f"Thought: {phrase}\nAction:"), 0, -1),
                (encode(f" {name}"), 1, 0),
                (encode("\nInput: item ="), 0, -1),
                (encode(f" {item}"), 1, 0),
                (encode(", day ="), 0, -1),
                (encode(f" {day}"), 1, 0),
                (encode("\n"), 0, -1),
            ]
        )
    return pad(tokenizer, "tools", rows, GROUPS["tools"])


def _numbers(tokenizer: Any, rng: np.random.Generator, n: int, split: str, noise: float) -> Records:
    """Two numbers of two digits, unrelated text, their total, which has two digits too."""
    digits(tokenizer)  # or an error
    encode = _encoder(tokenizer)
    notes = _stretches(tokenizer, rng, n * RECORDS, NOTE, split).unflatten(0, (n, RECORDS)).tolist()
    a, b = rng.integers(10, 50, size=(2, n, RECORDS))
    return pad(
        tokenizer,
        "numbers",
        [
            [
                piece
                for i in range(RECORDS)
                for piece in (
                    (encode(f" {a[row, i]} and {b[row, i]}, note:"), -1, -1),
                    (notes[row][i], 0, -1),
                    (encode(" total"), -1, -1),
                    (encode(f" {a[row, i] + b[row, i]}"), 1, i),
                    (encode("."), -1, -1),
                )
            ]
            for row in range(n)
        ],
        GROUPS["numbers"],
    )


def _documents(tokenizer: Any, rng: np.random.Generator, n: int, split: str, noise: float) -> Records:
    """Reference text; the tokens of a noisy stretch are drawn from the same text, so their frequency tells nothing."""
    body = _stretches(tokenizer, rng, n, LENGTH - 1, split)
    pool = _text(tokenizer, split).flatten()
    anywhere = pool[torch.from_numpy(rng.integers(len(pool), size=body.shape))]
    bad = rng.random((n, -(-body.shape[1] // STRETCH))) < noise
    bad = torch.from_numpy(bad.repeat(STRETCH, axis=1)[:, : body.shape[1]].copy())
    ids = torch.cat([torch.full((n, 1), docs.first_token(tokenizer)), body.where(~bad, anywhere)], dim=1)
    group = torch.cat([torch.full((n, 1), -1), (~bad).long()], dim=1)
    nothing = torch.full_like(ids, -1)
    labels = ids.where(group >= 0, IGNORED)
    return Records("documents", ids, torch.ones_like(ids), labels, group, nothing, GROUPS["documents"])


_MAKERS = {"arithmetic": _arithmetic, "tools": _tools, "numbers": _numbers, "documents": _documents}


def sample(
    tokenizer: Any, kind: str, n: int = 2048, seed: int = 0, split: str = "train", noise: float | None = None
) -> Records:
    """Draw rows.

    Args:
        tokenizer: a Hugging Face tokenizer, such as ``kr.load("llama-docs-draft").processor``.
        kind: one of `KINDS`; or a public instruction set, see `instructions.load`.
        n: number of rows.
        seed: decides all that is drawn.
        split: "train"; "reference" and "test", both without noise, and on other text where the task has text.
        noise: share of wrong answers (`arithmetic`) or of tokens from anywhere (`documents`) in the training split;
            `NOISE` when None. Of a public set: share of noise, or None to tell numbers from text.

    Returns:
        The rows.

    Raises:
        ValueError: Unknown kind or split, ``n`` below 1, ``noise`` outside [0, 1] or where the task or split has none,
            for `numbers` a tokenizer that does not write numbers digit by digit.

    Example:
        >>> sample(tokenizer, "arithmetic", n=2).group.tolist()   # doctest: +SKIP
    """
    check.choice("split", split, SPLITS)
    check.whole("n", n)
    public = kind not in KINDS and ("/" in kind or "." in kind)
    if not public:
        check.choice("kind", kind, KINDS)
    usual = NOISE.get(kind, 0.0) if split == "train" else 0.0
    share = check.number("noise", usual if noise is None else noise, 0.0, 1.0)
    if public:
        from keeprate.tasks.finetune import instructions

        return instructions.load(tokenizer, kind, n, seed, split, None if noise is None else share)
    if share and (kind not in NOISE or split != "train"):
        raise ValueError(f"noise must be None or 0 for kind {kind!r}, split {split!r}; got {noise!r}")
    rng = np.random.default_rng([seed, KINDS.index(kind), SPLITS.index(split)])
    return _MAKERS[kind](tokenizer, rng, n, split, share)
