"""What other models think of a data set's tokens, computed once, kept on disk, and checked where it is used."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from keeprate.check import whole
from keeprate.method import Method
from keeprate.sft.baselines import SFT
from keeprate.sft.data import IGNORE, OWN, Collator, Labels, check_row, columns_of
from keeprate.sft.session import Session
from keeprate.sft.tokens import Tokens

ABOUT = "keeprate.json"


@dataclass(frozen=True)
class Scores:
    """Losses of one model on every target token of a data set.

    Attributes:
        nll: For every row, [n] fp32: -log p of each target, 0 where there is none.
        digest: For every row, what identifies its tokens and targets.
        tokenizer: Fingerprint of the tokenizer; "" if it was not given.
        model: Name of the model.
    """

    nll: tuple[np.ndarray, ...] = field(repr=False)
    digest: tuple[str, ...] = field(repr=False)
    tokenizer: str = ""
    model: str = ""

    def __len__(self) -> int:
        return len(self.nll)

    def join(self, data: Any, name: str, tokenizer: Any = None) -> Any:
        """The data set with these losses as a column.

        Args:
            data: The rows the scores were made of, in the same order: a `datasets.Dataset`, or mappings.
            name: Of the column; one of that name is replaced.
            tokenizer: The one in use; checked against the scores' if both are known.

        Returns:
            The same kind of data set as was given (mappings come as a list).

        Raises:
            ValueError: If the scores were made with another tokenizer, or of another data set.
        """
        if name in OWN:
            raise ValueError(f"a column of scores cannot be called {name!r}, which the model reads")
        found = "" if tokenizer is None else fingerprint(tokenizer)
        if found and self.tokenizer and found != self.tokenizer:
            raise ValueError(
                f"these scores were made with tokenizer {self.tokenizer}; the one given is {found}. "
                "Allowed: the tokenizer they were made with, or scores made anew"
            )
        if len(data) != len(self):
            raise ValueError(f"these scores are of {len(self)} rows; the data set has {len(data)}")
        for i, (row, known) in enumerate(zip(_tokens_of(data), self.digest, strict=True)):
            if digest(row) != known:
                raise ValueError(f"row {i} has other tokens or targets than the row these scores were made of")
        return with_column(data, name, [x.tolist() for x in self.nll])

    def save(self, folder: str | Path) -> None:
        """Write to a folder, as a `datasets` data set with `keeprate.json` beside it."""
        import datasets  # a machine that only trains may lack it

        rows = {"digest": list(self.digest), "nll": [x.tolist() for x in self.nll]}
        kinds = datasets.Features({"digest": datasets.Value("string"), "nll": datasets.List(datasets.Value("float32"))})
        datasets.Dataset.from_dict(rows, kinds).save_to_disk(str(folder))
        about = {"tokenizer": self.tokenizer, "model": self.model}
        (Path(folder) / ABOUT).write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Read what `save` wrote.

        Raises:
            ValueError: If the folder holds no scores.
        """
        about = Path(folder) / ABOUT
        if not about.is_file():
            raise ValueError(f"{folder} holds no scores: {ABOUT} is missing. Allowed: a folder written by Scores.save")
        import datasets

        rows = datasets.load_from_disk(str(folder)).with_format("numpy")
        return cls(
            tuple(np.asarray(x, dtype=np.float32) for x in rows["nll"]),
            tuple(map(str, rows["digest"])),
            **json.loads(about.read_text(encoding="utf-8")),
        )


def score(model: nn.Module, data: Any, *, tokenizer: Any = None, batch_size: int = 32) -> Scores:
    """Loss of every target token under a model, one pass over the data.

    Args:
        model: A causal language model; its mode and device stay.
        data: Rows with `input_ids` and, where not every token is a target, `labels`.
        tokenizer: What the ids come from; its fingerprint goes with the scores.
        batch_size: Rows at a time, of similar length.

    Raises:
        ValueError: If the data set is empty.
    """
    whole("batch_size", batch_size)
    rows = list(_tokens_of(data))
    if not rows:
        raise ValueError("a data set needs at least one row; got none")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    collate, device = Collator(pad=0, columns=()), next(model.parameters()).device
    found: list[np.ndarray | None] = [None] * len(rows)
    with Probe(SFT(), model) as probe:
        for start in range(0, len(rows), batch_size):
            some = order[start : start + batch_size]
            t = probe(collate([rows[i] for i in some]), device)
            nll = t.labels.new_zeros(t.labels.shape, dtype=torch.float32)
            nll[t.row, t.place] = t.nll.float()
            for i, losses in zip(some, nll.cpu().numpy(), strict=True):
                found[i] = losses[: len(rows[i]["input_ids"])].copy()
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    about = "" if tokenizer is None else fingerprint(tokenizer)
    return Scores(tuple(found), tuple(map(digest, rows)), about, str(name))


class Probe:
    """A model that is asked about tokens without being trained; its mode is as before afterwards."""

    def __init__(self, method: Any, model: nn.Module):
        self.model, self.session = model, Session(method, model, always=True)

    def __enter__(self) -> "Probe":
        self.session.__enter__()
        self.training = self.model.training
        self.model.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self.session.__exit__(*error)
        self.model.train(self.training)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], device: torch.device | None = None) -> Tokens:
        """The predicted tokens of a batch made by `Collator`, or of input_ids, labels and perhaps a mask."""
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels", batch["input_ids"])
        columns = labels.columns if isinstance(labels, Labels) else {}
        known = {"input_ids", "attention_mask", "position_ids", "use_cache"}
        outputs = self.model(**{k: v for k, v in batch.items() if k in known})
        return self.session.tokens(outputs, labels.as_subclass(torch.Tensor), columns)


@dataclass(frozen=True)
class Weighed:
    """How a method weighs the tokens of a batch. All [b, n], an entry at the place of its target.

    Attributes:
        weight: The weight; 0 where there is no target.
        score: How much the token matters to the method, higher = more; NaN where there is no target.
        nll: -log p; NaN where there is no target.
        target: Which tokens are predicted.
    """

    weight: torch.Tensor
    score: torch.Tensor
    nll: torch.Tensor
    target: torch.Tensor


def weigh(method: Any, model: nn.Module, batch: Mapping[str, Any]) -> Weighed:
    """How a method would weigh a batch at this point of the training, without training.

    Args:
        method: Of this family.
        model: A causal language model.
        batch: What `Collator` makes, or input_ids [b, n] with labels and attention_mask.

    Example:
        >>> seen = weigh(kr.sft.DFT(), llm.model, kr.sft.Collator(llm.processor)(rows))   # doctest: +SKIP
    """
    if not isinstance(method, Method) or not isinstance(batch, Mapping):
        given = f"{type(method).__name__} and {type(batch).__name__}"
        raise ValueError(
            f"weigh takes a method, such as kr.sft.DFT(), and a batch, as a Collator makes it; got {given}"
        )
    with Probe(method, model) as probe, torch.no_grad():
        t = probe(batch, next(model.parameters()).device)
        own, factor = method.weights(t)
        found = {"weight": own * factor, "score": method.score(t), "nll": t.nll}
        target = torch.zeros(t.labels.shape, dtype=torch.bool, device=t.labels.device)
        target[t.row, t.place] = True
        whole_ = {}
        for name, value in found.items():
            empty = 0.0 if name == "weight" else torch.nan
            whole_[name] = torch.full(target.shape, empty, dtype=torch.float32, device=target.device)
            whole_[name][t.row, t.place] = value.float()
    return Weighed(target=target, **whole_)


def frequency(data: Any, name: str = "frequency") -> Any:
    """The data set with a column that says how often each target occurs in it, as a share of all targets.

    Args:
        data: Rows with `input_ids` and perhaps `labels`.
        name: Of the column.

    Returns:
        The same kind of data set; the column is 0 where there is no target.
    """
    rows = [targets_of(row) for row in _tokens_of(data)]
    count = Counter(label for row in rows for label in row if label != IGNORE)
    total = max(count.total(), 1)
    return with_column(data, name, [[0.0 if i == IGNORE else count[i] / total for i in row] for row in rows])


def targets_of(row: Mapping[str, Any]) -> list[int]:
    """Labels of a row as the collator will make them: -100 where there is no target, as at the first token."""
    given = row["input_ids"] if row.get("labels") is None else row["labels"]
    labels = [int(i) for i in given]
    return [IGNORE, *labels[1:]]


def digest(row: Mapping[str, Any]) -> str:
    """What identifies the tokens and targets of a row."""
    told = np.asarray([row["input_ids"], targets_of(row)], dtype=np.int64)
    return hashlib.sha256(told.tobytes()).hexdigest()[:16]


def fingerprint(tokenizer: Any) -> str:
    """What identifies a tokenizer: its rules and vocabulary, not how it was last called."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told = repr(sorted(tokenizer.get_vocab().items()))
    else:
        rules = json.loads(backend.to_str())
        told = json.dumps({k: v for k, v in rules.items() if k not in ("padding", "truncation")}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def with_column(data: Any, name: str, values: Sequence[Sequence[float]]) -> Any:
    """A data set with one more per-token column; one of that name is replaced."""
    if hasattr(data, "add_column"):
        if name in data.column_names:
            data = data.remove_columns(name)
        return data.add_column(name, list(values))
    return [{**row, name: value} for row, value in zip(data, values, strict=True)]


def rows_of(data: Any) -> list[dict[str, Any]]:
    """A data set as a list of rows with their per-token columns."""
    rows = list(_one_split(data))
    keep = ("input_ids", "labels", "attention_mask", *columns_of(rows))
    return [{name: row[name] for name in keep if name in row} for row in rows]


def _one_split(data: Any) -> Any:
    if isinstance(data, Mapping):
        raise ValueError(
            f"a data set must be a sequence of rows; got {type(data).__name__} of {', '.join(map(str, data))}: give one"
        )
    return data


def _tokens_of(data: Any) -> Iterable[dict[str, Any]]:
    """Tokens and targets of every row, without the other columns."""
    if hasattr(data, "select_columns"):
        data = data.select_columns([name for name in ("input_ids", "labels") if name in data.column_names])
    for i, row in enumerate(_one_split(data)):
        check_row(row, i)
        yield {name: row[name] for name in ("input_ids", "labels") if row.get(name) is not None}
