"""Questions about contexts, for language models: recall drawn here, or the rows of a public data set such as RULER.

Both come as `Recall` batches, so that the same measurement runs on either. A public data set has the columns context,
question (or input) and answer (or answers), and may have answer_prefix, the words the answer begins behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeprate import check
from keeprate.tasks import docs, recall
from keeprate.tasks.recall import Recall

COLUMNS = (("context",), ("question", "input"), ("answer", "answers"))
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_CUT = "\u241e"  # stands between context and question while a chat template is applied


def questions(
    tokenizer: Any, task: str = "needles", n: int = 32, length: int = 1024, seed: int = 0, split: str = "test"
) -> list[Recall]:
    """Questions with their contexts and answers, in batches of equal lengths.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template, if it has one, is put around public data.
        task: One of `recall.KINDS`; a hub data set "org/name" or "org/name:config"; or a file .jsonl or .parquet.
        n: Number of questions.
        length: Tokens of a context. One of public data that is longer loses its middle, a shorter one stays.
        seed: Decides which.
        split: Of the text or the data set.

    Returns:
        One batch of recall, or one batch of a single question per row of public data. There, `truth` marks where the
        answer's text stands in the context, and nothing if it does not stand there.

    Raises:
        ValueError: On an unknown task or split, columns that do not fit, or arguments that do not suit `recall.sample`.

    Example:
        >>> questions(llm.processor, "simonjegou/ruler:4096", n=100, length=4096)   # doctest: +SKIP
    """
    check.whole("n", n), check.whole("length", length)
    if task in recall.KINDS:
        return [recall.sample(tokenizer, task, n, length, seed, split)]
    found = [_question(tokenizer, task, length, *row) for row in _rows(task, n, seed, split)]
    if not found:
        raise ValueError(f"split {split!r} of task {task!r} has no rows")
    return found


def _rows(task: str, n: int, seed: int, split: str) -> Iterator[tuple[str, str, str, str]]:
    """Context, question, answer prefix, answer of n random rows."""
    import datasets

    name, _, config = task.partition(":")
    local = Path(name).suffix in SUFFIXES and Path(name).is_file()
    try:
        if local:
            data = datasets.load_dataset(SUFFIXES[Path(name).suffix], data_files={split: name}, split=split)
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"task {task!r} with split {split!r} is unknown; allowed: {', '.join(map(repr, recall.KINDS))}, "
            f"a file .jsonl or .parquet, or a hub data set 'org/name:config' ({error})"
        ) from error
    names = [next((c for c in some if c in data.column_names), None) for some in COLUMNS]
    if None in names:
        wanted = ", ".join(" or ".join(some) for some in COLUMNS)
        raise ValueError(f"task {task!r} has the columns {', '.join(data.column_names)}; needed: {wanted}")
    for row in data.shuffle(seed=seed).select(range(min(n, len(data)))):
        context, asked, answer = (row[c] for c in names)
        yield context, asked, row.get("answer_prefix") or "", answer if isinstance(answer, str) else answer[0]


def _question(tokenizer: Any, task: str, length: int, context: str, asked: str, prefix: str, answer: str) -> Recall:
    """One row as token ids."""
    head, tail, answer = context, "\n\n" + asked, answer.strip()
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": f"{context}{_CUT}{tail}"}]
        told = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        head, _, tail = told.partition(_CUT)
        bos = []  # the template writes it
    else:
        tail, bos = tail + "\n", [docs.first_token(tokenizer)]
    tail += prefix
    told = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
    starts = [i for i in range(len(head)) if answer and head.startswith(answer, i)]
    marks = [any(begin < s + len(answer) and end > s for s in starts) for begin, end in told["offset_mapping"]]
    ids, truth = [*bos, *told["input_ids"]], [*([False] * len(bos)), *marks]
    if len(ids) > length:  # both ends say more than the middle does: instructions, and what is nearest to the question
        first, last = (length + 1) // 2, length // 2
        ids, truth = (x[:first] + (x[-last:] if last else []) for x in (ids, truth))
    space = "" if tail.endswith((" ", "\n")) else " "
    behind = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (tail, space + answer)]
    if not all(behind):
        raise ValueError(f"task {task!r} has a row without question or answer: {asked[:80]!r}, {answer[:80]!r}")
    rows = [torch.tensor([x]) for x in (ids, *behind)]
    marked: Tensor = torch.tensor([truth])
    return Recall(task, *rows, marked, torch.zeros_like(marked))
