"""Load a model by name: an embedded checkpoint, a `save_pretrained` folder or a Hugging Face hub id, one code path."""

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available, logging

PIXELS = "pil"  # gives the same pixels with and without torchvision


@dataclass(frozen=True)
class Loaded:
    """A model, ready for evaluation, with all that is needed to feed it.

    Attributes:
        name: As given to `load`.
        model: The transformers model in eval mode.
        processor: Its image processor, or tokenizer or processor for models that read text.
        card: What `card.json` says about an embedded model; empty for others.
        task: Name of the task it was trained on (see `kr.task`); None when unknown.
    """

    name: str
    model: nn.Module
    processor: Any = field(repr=False)
    card: dict[str, Any] = field(repr=False, default_factory=dict)
    task: str | None = None

    def __repr__(self) -> str:
        weight = next(self.model.parameters())
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        kind = f"{type(self.model).__name__}, {millions:.2f} M parameters, {str(weight.dtype)[6:]} on {weight.device}"
        return f"Loaded({self.name!r}: {kind}, task {self.task!r})"


def load(name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32) -> Loaded:
    """Load a model with its processor. Only safetensors are read, and no code from a checkpoint is run.

    Args:
        name: An embedded model (see `kr.models()`), a folder written by `save_pretrained`, or a hub id "org/name".
        device: Where the model goes.
        dtype: Of its weights.

    Returns:
        The model in eval mode, of the class that its config names.

    Raises:
        ValueError: On a name that is none of the three, a hub that cannot be reached, a file that is missing, damaged
            (its sha256 differs from the card's) or not in safetensors, weights that do not fill the model.

    Example:
        >>> vit = load("vit-digits")   # doctest: +SKIP
        >>> vit.model(**vit.processor(image, return_tensors="pt")).logits   # doctest: +SKIP
    """
    known = _embedded()
    folder = known.get(name) or (Path(name) if (Path(name) / "config.json").is_file() else None)
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"no model called {name!r}. Allowed: an embedded model ({', '.join(known) or 'none here'}), a folder "
            'written by save_pretrained, or a hub id "org/name"'
        )
    card = {} if folder is None else _verified(folder)
    source = name if folder is None else str(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForImageClassification)
        with _quiet():
            model, info = cls.from_pretrained(source, dtype=dtype, use_safetensors=True, output_loading_info=True)
        processor = _processor(source, config, model.main_input_name)
    except (OSError, RuntimeError, ImportError) as error:
        where = f"folder {source}" if folder else f"hub id {name!r}, which is no local folder either,"
        raise ValueError(f"{where} could not be loaded: {error}") from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{source} lacks {len(info['missing_keys'])} weights of {type(model).__name__}, such as {some}"
        )
    return Loaded(name, model.to(device).eval(), processor, card, card.get("task", name if name in known else None))


def _processor(source: str, config: transformers.PreTrainedConfig, reads: str) -> Any:
    """What feeds a model that reads pixels alone, or text and perhaps pixels."""
    if reads == "pixel_values":
        return transformers.AutoImageProcessor.from_pretrained(source, backend=PIXELS)
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is not None and "video_processor" in kind.get_attributes() and not is_torchvision_available():
        # the part for videos alone needs torchvision; questions about images do without
        parts = [name for name in kind.get_attributes() if name != "video_processor"]
        kind = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
        processor = kind.from_pretrained(source)
    else:
        processor = transformers.AutoProcessor.from_pretrained(source)
    if hasattr(processor, "image_processor"):
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(source, backend=PIXELS)
    return processor


def models() -> pd.DataFrame:
    """Table of the embedded models.

    Returns:
        DataFrame with columns name, class, parameters, accuracy (test, as a fraction), size MB, task.

    Example:
        >>> models()   # doctest: +SKIP
    """
    columns = ["name", "class", "parameters", "accuracy", "size MB", "task"]
    rows = []
    for name, folder in _embedded().items():
        card = json.loads((folder / "card.json").read_text())
        accuracy = card.get("accuracy")
        rows.append(
            {
                "name": name,
                "class": json.loads((folder / "config.json").read_text())["architectures"][0],
                "parameters": sum(_parameters(file) for file in folder.glob("*.safetensors")),
                "accuracy": accuracy["value"] if isinstance(accuracy, dict) else accuracy,
                "size MB": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
                "task": card.get("task", name),
            }
        )
    return pd.DataFrame(rows, columns=columns)


def _embedded() -> dict[str, Path]:
    """Folders of the embedded models by name; none when the package is installed without its repository."""
    from keeprate.project import root

    try:
        folder = root() / "data" / "models"
    except FileNotFoundError:
        return {}
    return {card.parent.name: card.parent for card in sorted(folder.glob("[!.]*/card.json"))}


def _verified(folder: Path) -> dict[str, Any]:
    """The card of a folder, {} if it has none, after comparing the files with the card's sha256."""
    path = folder / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    for name, expected in card.get("sha256", {}).items():
        file = folder / name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"
        if found != expected:
            raise ValueError(f"{file} is damaged: its sha256 must be {expected}; found {found}")
    return card


def _parameters(file: Path) -> int:
    """Number of weights in a safetensors file, read from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return sum(torch.Size(entry["shape"]).numel() for key, entry in header.items() if key != "__metadata__")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports; what matters in the latter is checked and raised."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
