"""Batches whose labels know their per-token columns: weights, reference losses, groups.

The Trainer hands a loss function the labels and nothing else of a batch. So the columns travel with the labels, as
attributes of a tensor that is otherwise an ordinary one.
"""

import reprlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keeprate.check import unknown, whole

IGNORE = -100  # transformers' label of a position that is no target
MASKS = ("completion_mask", "assistant_masks")  # of which TRL's collator makes labels
OWN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.detach, torch.Tensor.clone}
_MOVES |= {torch.Tensor.pin_memory, torch.Tensor.contiguous}


class Labels(torch.Tensor):
    """Labels [b, n] with columns of the same shape; moving them to a device takes the columns along.

    Any other operation gives a plain tensor.

    Attributes:
        columns: Name to [b, n] tensor; an entry belongs to the token at its own place, the target.
    """

    columns: dict[str, torch.Tensor]

    @staticmethod
    def of(labels: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> "Labels":
        """Labels with columns.

        Raises:
            ValueError: If a column has another shape than the labels.
        """
        check_columns(labels, columns)
        found = labels.as_subclass(Labels)
        found.columns = dict(columns)
        return found

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            source = args[0] if args else None
            if func not in _MOVES or not isinstance(source, cls) or result is source:
                return result
            # only the place follows, for a column of losses does not become an integer
            move = {k: v for k, v in kwargs.items() if k != "dtype"}
            rest = [a for a in args[1:] if not isinstance(a, torch.dtype)]
            columns = {name: func(column, *rest, **move) for name, column in source.columns.items()}
            return cls.of(result.as_subclass(torch.Tensor), columns)

    def __reduce_ex__(self, protocol):  # for the workers of a DataLoader
        return _rebuild, (self.as_subclass(torch.Tensor), self.columns)


def _rebuild(labels: torch.Tensor, columns: dict[str, torch.Tensor]) -> Labels:
    return Labels.of(labels, columns)


def check_columns(labels: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError if a column has another shape than the labels."""
    for name, column in columns.items():
        if not isinstance(column, torch.Tensor) or column.shape != labels.shape:
            given = tuple(column.shape) if isinstance(column, torch.Tensor) else type(column).__name__
            raise ValueError(f"{name} must be a tensor {tuple(labels.shape)}, as the labels; got {given}")


class Collator:
    """Make batches of rows of different lengths, with every per-token column beside the labels.

    A row holds `input_ids`, optionally `labels` (else every token is a target; -100 marks those that are none) and any
    number of per-token columns of the same length. The first token of a sequence is never a target. Rows come without
    padding; an `attention_mask` of ones is passed over.

    With the Trainer, set `remove_unused_columns=False` in its arguments, or the columns are gone before they get here.

    Args:
        tokenizer: Source of the padding token; None if `pad` is given.
        columns: Columns that every row must have; None takes all per-token columns that the first row has.
        max_length: Longer sequences lose their end, with the columns.
        pack: Put several sequences into rows of at most this many tokens, each seeing only itself; None = one a row.
        pad: Token for padding.
        multiple: Pad to a multiple of this many tokens.

    Raises:
        ValueError: If a length is below 1, a sequence does not fit into `pack`, or there is no padding token.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "weights": [1.0, 1.0, 0.5]}, {"input_ids": [8, 9], "weights": [1.0, 2.0]}]
        >>> batch = Collator(pad=0)(rows)
        >>> batch["labels"].columns["weights"]
        tensor([[1.0000, 1.0000, 0.5000],
                [1.0000, 2.0000, 0.0000]])
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        columns: Sequence[str] | None = None,
        max_length: int | None = None,
        pack: int | None = None,
        pad: int | None = None,
        multiple: int = 1,
    ):
        if pad is None:
            ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
            pad = next((i for i in ids if i is not None), None)
        if pad is None:
            raise ValueError("a Collator needs a padding token: a tokenizer that has one, or pad=<token id>")
        for name, value in (("max_length", max_length), ("pack", pack), ("multiple", multiple)):
            if value is not None:
                whole(name, value)
        self.pad, self.max_length, self.pack, self.multiple = pad, max_length, pack, multiple
        self.columns = None if columns is None else tuple(columns)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            rows: Mappings as described above.

        Returns:
            input_ids and labels [b, n] (the labels a `Labels`), and attention_mask [b, n] or, if packed, position_ids.

        Raises:
            ValueError: If there is no row, a column is missing, or has another length than the labels, or holds NaN.
        """
        if not rows:
            raise ValueError("a batch needs at least one row; got none")
        names = columns_of(rows) if self.columns is None else self.columns
        sequences = [self._sequence(i, row, names) for i, row in enumerate(rows)]
        bins = self._bins([len(s["input_ids"]) for s in sequences])
        longest = max(sum(len(sequences[i]["input_ids"]) for i in bin_) for bin_ in bins)
        width = -(-longest // self.multiple) * self.multiple
        fills = {"input_ids": self.pad, "labels": IGNORE, "sequence": -1}
        joined = {
            name: torch.stack([_padded([sequences[i][name] for i in bin_], width, fills.get(name, 0)) for bin_ in bins])
            for name in sequences[0]
        }
        batch = {"input_ids": joined.pop("input_ids")}
        place, number = joined.pop("place"), joined["sequence"]
        if self.pack:
            # transformers tells packed sequences apart by positions that begin anew, where there is no mask or cache
            padding = number < 0
            batch["position_ids"] = torch.where(padding, padding.long().cumsum(1) - 1, place)
            batch["use_cache"] = False
        else:
            batch["attention_mask"] = (number >= 0).long()
            joined.pop("sequence")
        return batch | {"labels": Labels.of(joined.pop("labels"), joined)}

    def _sequence(self, i: int, row: Mapping[str, Any], names: Iterable[str]) -> dict[str, torch.Tensor]:
        check_row(row, i)
        ids = _numbers(i, "input_ids", row["input_ids"])
        labels = _numbers(i, "labels", row["labels"]).clone() if row.get("labels") is not None else ids.clone()
        if ids.dim() != 1 or not len(ids) or labels.shape != ids.shape:
            raise ValueError(
                f"row {i}: input_ids and labels must be equally long lists of at least one token; "
                f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
            )
        mask = row.get("attention_mask")
        if mask is not None and not _numbers(i, "attention_mask", mask).all():
            raise ValueError(f"row {i}: attention_mask holds 0; rows must come without padding, which is made here")
        told = next((name for name in MASKS if row.get(name) is not None), None)
        if told is not None and row.get("labels") is None:
            raise ValueError(f"row {i}: {told} without labels, and it is not read; make labels of it, {IGNORE} where 0")
        for name, x in (("input_ids", ids), ("labels", labels)):
            if x.is_floating_point():
                raise ValueError(f"row {i}: {name} must hold integers; got {x.dtype}")
        found = {"input_ids": ids.long(), "labels": labels.long()}
        found["labels"][0] = IGNORE
        for name in names:
            if name not in row:
                raise ValueError(
                    f"row {i}: {unknown('column', name, row)}. With the Trainer set "
                    "TrainingArguments(remove_unused_columns=False)"
                )
            column = _numbers(i, name, row[name])
            if column.shape != ids.shape:
                raise ValueError(f"row {i}: {name} must have {len(ids)} entries, as labels; got {tuple(column.shape)}")
            if column.is_floating_point():
                column = column.float()
                if column.isnan().any():
                    raise ValueError(f"row {i}: {name} holds NaN")
            found[name] = column
        found = {name: x[: self.max_length] for name, x in found.items()}
        short = len(found["input_ids"])
        # what tells sequences apart for a method that draws lots: their tokens, prompt included
        salt = zlib.crc32(found["input_ids"].numpy().astype(np.int64).tobytes())
        return found | {
            "place": torch.arange(short),
            "sequence": torch.full((short,), i),
            "salt": torch.full((short,), salt),
        }

    def _bins(self, lengths: list[int]) -> list[list[int]]:
        """Which sequences share a row; first fit, in the given order."""
        if self.pack is None:
            return [[i] for i in range(len(lengths))]
        bins: list[list[int]] = []
        room: list[int] = []
        for i, length in enumerate(lengths):
            if length > self.pack:
                raise ValueError(f"row {i} has {length} tokens, more than pack={self.pack}; set max_length")
            j = next((j for j, left in enumerate(room) if left >= length), len(bins))
            if j == len(bins):
                bins.append([])
                room.append(self.pack)
            bins[j].append(i)
            room[j] -= length
        return bins


def columns_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the columns that rows carry: those per token of the first, and weights wherever a row has them."""
    names = per_token(rows[0])
    # a method that needs another column says so; weights of a wrong length would be passed over without a word
    weighted = any(row.get("weights") is not None for row in rows)
    return (*names, "weights") if weighted and "weights" not in names else names


def check_row(row: Any, i: int = 0) -> None:
    """Raise a ValueError if a row holds no tokens."""
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        given = f"the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else repr(row)
        raise ValueError(f"row {i}: rows must hold input_ids, the numbers of their tokens; got {given}")


def per_token(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a row's columns that have a number for every token."""
    check_row(row)
    length = len(row["input_ids"])

    def fits(value: Any) -> bool:
        if isinstance(value, torch.Tensor | np.ndarray):
            return value.ndim == 1 and len(value) == length
        # None is no number, but a column that begins with it wants to be one, and the collator says so
        numeric = isinstance(value, list | tuple) and len(value) == length > 0
        return numeric and (value[0] is None or isinstance(value[0], int | float))

    return tuple(name for name, value in row.items() if name not in OWN and fits(value))


def _numbers(i: int, name: str, values: Any) -> torch.Tensor:
    """A column of row i as a tensor."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"row {i}: {name} must hold a number for every token; got {reprlib.repr(values)}") from error


def _padded(parts: list[torch.Tensor], width: int, fill: int) -> torch.Tensor:
    row = torch.cat(parts)
    return torch.nn.functional.pad(row, (0, width - len(row)), value=fill)
