"""Rows of a public instruction set, in the form of the embedded tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keeprate.tasks import docs
from keeprate.tasks.finetune.records import BLOCKS, SPLITS, STRETCH, Piece, Records, pad
from keeprate.tasks.reading import SUFFIXES

LONGEST = 512  # tokens of a row: a prompt loses what is beyond half of it, an answer its end where no room is left
PROMPTS, ANSWERS = ("instruction", "question", "prompt"), ("output", "answer", "response", "completion")


def load(tokenizer: Any, source: str, n: int, seed: int, split: str, noise: float | None) -> Records:
    """Questions as prompts, answers as targets.

    With a share of noise the groups are noisy and clean, and a noisy stretch holds tokens from other answers. With None
    they are text and numeric: whether a token holds a digit.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template, if it has one, is put around the rows.
        source: a hub data set "org/name" or "org/name:config", or a file .jsonl or .parquet, with the columns
            instruction (or question, prompt), output (or answer, response, completion) and perhaps input; or messages.
        n: number of rows; fewer if there are no more.
        seed: decides which rows, and the noise.
        split: of this project; one row in eight is for test, one for reference, the others for training.
        noise: share of the target tokens; None for the other groups.

    Returns:
        The rows.

    Raises:
        ValueError: A data set that cannot be read, or has other columns.
    """
    data = _read(source)
    part = np.arange(len(data)) % BLOCKS
    mine = np.flatnonzero({"test": part == 0, "reference": part == 1, "train": part > 1}[split])
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    chosen = rng.permutation(mine)[:n]
    if not len(chosen):
        raise ValueError(f"{source!r} has {len(data)} rows, none of them for the split {split!r}; needed: {BLOCKS}")
    rows = [_pieces(tokenizer, source, data[int(i)]) for i in chosen]
    drawn = pad(tokenizer, source, rows, ("text", "numeric") if noise is None else ("noisy", "clean"))
    return _numeric(tokenizer, drawn) if noise is None else _noisy(drawn, rng, noise)


def _read(source: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        if Path(name).suffix in SUFFIXES and Path(name).is_file():
            return datasets.load_dataset(SUFFIXES[Path(name).suffix], data_files={"train": name}, split="train")
        return datasets.load_dataset(name, config or None, split="train")
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"{source!r} is neither a task, a file .jsonl or .parquet, nor a hub data set: {error}"
        ) from error


def _pieces(tokenizer: Any, source: str, row: Mapping[str, Any]) -> list[Piece]:
    """Prompt and answer of a row as tokens, without a first token."""
    if row.get("messages"):
        *before, last = row["messages"]
        asked, answer = "\n".join(said["content"] for said in before), last["content"]
    else:
        columns = [next((c for c in some if row.get(c)), None) for some in (PROMPTS, ANSWERS)]
        if None in columns:
            raise ValueError(
                f"{source!r} has the columns {', '.join(row)}; needed: messages, or one of {', '.join(PROMPTS)} "
                f"and one of {', '.join(ANSWERS)}"
            )
        asked, answer = (row[c] for c in columns)
        asked = f"{asked}\n{row['input']}" if row.get("input") else asked
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    else:
        prompt = f"{asked}\n"
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    start = docs.first_token(tokenizer)
    first = first[first[:1] == [start] :][: LONGEST // 2]
    # an answer that is cut does not end there, so it loses the last token as well
    second = [*second, tokenizer.eos_token_id][: LONGEST - 1 - len(first)]
    return [(first, -1, -1), (second, 1, -1)]


def _noisy(drawn: Records, rng: np.random.Generator, noise: float) -> Records:
    """Stretches of the targets replaced by targets from anywhere."""
    n, length = drawn.input_ids.shape
    bad = (rng.random((n, -(-length // STRETCH))) < noise).repeat(STRETCH, axis=1)[:, :length]
    bad = torch.from_numpy(bad.copy()) & drawn.truth
    pool = drawn.input_ids[drawn.truth]
    anywhere = pool[torch.from_numpy(rng.integers(len(pool), size=(n, length)))]
    ids = drawn.input_ids.where(~bad, anywhere)
    return drawn.replaced(input_ids=ids, group=drawn.group.where(~bad, 0))


def _numeric(tokenizer: Any, drawn: Records) -> Records:
    """Targets without a digit in the first group."""
    texts = tokenizer.batch_decode([[token] for token in range(int(drawn.input_ids.max()) + 1)])
    holds: Tensor = torch.tensor([any(c.isdecimal() for c in text) for text in texts])
    return drawn.replaced(group=torch.where(drawn.truth, holds[drawn.input_ids].long(), drawn.group))
