"""Image classification tasks through one interface: embedded, from the Hugging Face hub, or from a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keeprate.tasks import digits

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Task:
    """A sample of one split of a classification task.

    Attributes:
        name: as given to ``task``.
        split: as given to ``task``.
        classes: class names, in the order of the labels.
        data: columns ``image`` (PIL), ``label`` and, where the task knows it, ``truth`` (rows of booleans).
    """

    name: str
    split: str
    classes: tuple[str, ...]
    data: datasets.Dataset

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def labels(self) -> torch.Tensor:
        """Labels, int64 [n]."""
        return torch.tensor(self.data["label"][:])

    @cached_property
    def truth(self) -> torch.Tensor | None:
        """Which patches matter, bool [n, patches] in reading order; None when the task does not know."""
        if "truth" not in self.data.column_names:
            return None
        return torch.from_numpy(np.array(self.data["truth"][:], dtype=bool)).flatten(1)

    def batches(self, loaded: Any, batch_size: int = 32) -> Iterator[dict[str, torch.Tensor | None]]:
        """The sample in order, as a model takes it.

        Args:
            loaded: anything with a Hugging Face image processor as ``processor``.
            batch_size: images a batch; the last one may be smaller.

        Yields:
            ``pixel_values`` float [b, 3, h, w], ``labels`` int64 [b], ``truth`` bool [b, patches] or None.

        Raises:
            ValueError: ``batch_size`` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; allowed: at least 1")
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            images = [image.convert("RGB") for image in self.data[part]["image"]]
            yield {
                "pixel_values": loaded.processor(images=images, return_tensors="pt")["pixel_values"],
                "labels": self.labels[part],
                "truth": None if self.truth is None else self.truth[part],
            }


def _vit_digits(split: str, n: int, seed: int) -> datasets.Dataset:
    import datasets
    from PIL import Image

    drawn = digits.render(np.random.default_rng([seed, digits.SPLITS.index(split)]), n, split)
    columns = {
        "image": [Image.fromarray(pixels) for pixels in drawn.pixels.permute(0, 2, 3, 1).numpy()],
        "label": drawn.labels.tolist(),
        "truth": drawn.truth.tolist(),
    }
    truth = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(digits.CLASSES)), "truth": truth}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


EMBEDDED: dict[str, Callable[[str, int, int], Any]] = {"vit-digits": _vit_digits}


def _public(name: str, split: str, n: int, seed: int) -> datasets.Dataset:
    """A random sample of a hub data set (streamed) or of a local folder ``[split/]class/image.jpg``."""
    import datasets

    local = Path(name).is_dir()
    source = {"path": "imagefolder", "data_dir": name} if local else {"path": name, "streaming": True}
    try:
        splits = datasets.load_dataset(**source)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        known = ", ".join(map(repr, EMBEDDED))
        raise ValueError(
            f"task {name!r} is unknown; allowed: {known}, a folder of images, or the id of a hub data set ({error})"
        ) from error
    if split not in splits:
        raise ValueError(f"split={split!r} of task {name!r} is unknown; allowed: {', '.join(map(repr, splits))}")
    data = splits[split]

    images = [key for key, value in data.features.items() if isinstance(value, datasets.Image)]
    labels = [key for key, value in data.features.items() if isinstance(value, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"task {name!r} has the columns {dict(data.features)}; needed: one of type Image and one of type ClassLabel"
        )
    image, label = images[0], labels[0]
    data = data.select_columns([image, label])
    if local:
        shuffled = data.shuffle(seed=seed)
        data = shuffled.select(range(min(n, len(shuffled))))
    else:
        stored = data.cast_column(image, datasets.Image(decode=False))  # the files' own bytes, not encoded once more
        rows = list(stored.shuffle(seed=seed, buffer_size=max(1000, n)).take(n))
        data = datasets.Dataset.from_list(rows, features=data.features)
    data = data.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    if len(data) < n:
        raise ValueError(f"n={n}; allowed: 1 to {len(data)}, the size of split {split!r} of task {name!r}")
    if min(data["label"][:]) < 0:
        raise ValueError(f"split={split!r} of task {name!r} has no labels; allowed: another of {', '.join(splits)}")
    return data


def task(name: str, split: str = "test", n: int = 512, seed: int = 0) -> Task:
    """Load a sample of a task.

    Args:
        name: "vit-digits"; or the id of a hub data set with an image and a class-label column, such as
            "ILSVRC/imagenet-1k"; or a local folder ``[split/]class/image.jpg``.
        split: of the task; "train" or "test" for embedded tasks.
        n: number of images.
        seed: decides which images; embedded tasks render them from it.

    Returns:
        The sample. Public data sets have no truth.

    Raises:
        ValueError: unknown name or split, ``n`` below 1 or above what the split holds, no usable columns, no labels.
    """
    if n < 1:
        raise ValueError(f"n={n}; allowed: at least 1")
    if name in EMBEDDED:
        digits.check_split(split)
        data = EMBEDDED[name](split, n, seed)
    else:
        data = _public(name, split, n, seed)
    return Task(name, split, tuple(data.features["label"].names), data)
