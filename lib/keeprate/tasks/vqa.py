"""Questions about images through one interface: scenes drawn here, or public data such as POPE, GQA and TextVQA.

The scenes of ``keeprate.tasks.scenes`` know which patches hold the answer; public data does not. Public data is a hub
data set or a local copy of one, with the columns question, answer (or answers) and image (or images); where the images
stand in a data set of their own, as in GQA, a column imageId points at its ids. Each benchmark keeps its own metric and
the words that LLaVA puts behind its questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keeprate import check
from keeprate.tasks import scenes, words

if TYPE_CHECKING:
    import datasets

EMBEDDED = ("scenes", "llava-digits")  # the task, and the model that is trained on it
SHORT = "Answer the question using a single word or phrase."  # behind public questions, as in LLaVA-1.5's evaluation


@dataclass(frozen=True)
class Public:
    """Where a benchmark lies on the hub.

    Attributes:
        hub: id of the data set.
        config: its configuration; None = the default one.
        split: that papers report.
        metric: one of `words.METRICS`.
        files: pattern of the split's files, for data whose other splits are large; None = all are fetched.
    """

    hub: str
    config: str | None
    split: str
    metric: str
    files: str | None = None


PUBLIC = {
    "pope": Public("lmms-lab/POPE", None, "test", "yesno"),
    "gqa": Public("lmms-lab/GQA", "testdev_balanced_instructions", "testdev", "exact"),
    "textvqa": Public("lmms-lab/textvqa", None, "validation", "vqa", "data/validation-*"),
}


@dataclass(frozen=True)
class Batch:
    """Questions as a model takes them.

    Attributes:
        inputs: the model's keyword arguments; text is padded on the left.
        rows: which questions of the task these are.
    """

    inputs: dict[str, Tensor] = field(repr=False)
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """The inputs on a model's device, pixels in its precision.

        Raises:
            ValueError: something else than a model, such as a device.
        """
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"to takes the model that the inputs are for; got {model!r}")
        weight = next(model.parameters())
        return {
            name: x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
            for name, x in self.inputs.items()
        }


@dataclass(frozen=True)
class VQA:
    """A sample of questions about images.

    Attributes:
        name: as given to `vqa`.
        split: of the task or data set.
        metric: "exact": the answer and nothing else; "yesno": POPE's reading of free text; "vqa": agreement with ten
            people, as TextVQA counts it. See `words.score`.
        images: for each question a list of PIL images; those of public data are read from disk when they are asked for.
        questions: as the task words them.
        answers: for each question all that count as right.
        kinds: for each question its kind.
        suffix: what stands behind the question in the prompt.
        new_tokens: enough for any answer.
        truth: bool [n, patches] in reading order of a square grid, what must be seen; None when the task does not know.
        local: bool [n], False where no particular patches decide; None when the task does not know.
    """

    name: str
    split: str
    metric: str
    images: Sequence[list[Any]] = field(repr=False)
    questions: list[str] = field(repr=False)
    answers: list[tuple[str, ...]] = field(repr=False)
    kinds: list[str] = field(repr=False)
    suffix: str = ""
    new_tokens: int = 16
    truth: Tensor | None = field(default=None, repr=False)
    local: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.questions)

    def score(self, said: Sequence[str], rows: Sequence[int] | None = None) -> Tensor:
        """How right answers are.

        Args:
            said: what a model answered.
            rows: the questions they answer; None = all, in order.

        Returns:
            bool [n]; for the metric "vqa" float [n] in 0..1.

        Raises:
            ValueError: not one answer for each question.
        """
        rows = range(len(self)) if rows is None else rows
        if len(said) != len(rows):
            raise ValueError(f"{len(said)} answers to {len(rows)} questions; allowed: one each")
        return words.score(self.metric, said, [self.answers[i] for i in rows])

    def truth_on(self, tokens: int) -> Tensor | None:
        """The truth on the grid of a model.

        Args:
            tokens: visual tokens the model makes of an image, a square number.

        Returns:
            bool [n, tokens]; where one token holds several patches, it is needed if one of them is. None when the task
            does not know.

        Raises:
            ValueError: neither grid is a whole multiple of the other.
        """
        if self.truth is None or self.truth.shape[1] == tokens:
            return self.truth
        side, mine = round(tokens**0.5), round(self.truth.shape[1] ** 0.5)
        if side**2 != tokens or max(side, mine) % min(side, mine):
            raise ValueError(
                f"truth is known on {mine}x{mine} patches; {tokens} visual tokens are no square grid that divides it "
                "or that it divides"
            )
        grid = self.truth.view(-1, mine, mine)
        if side > mine:
            return grid.repeat_interleave(side // mine, 1).repeat_interleave(side // mine, 2).flatten(1)
        part = mine // side
        return grid.view(-1, side, part, side, part).any(4).any(2).flatten(1)

    def prompt(self, processor: Any, row: int) -> str:
        """One question as text: in the processor's chat template, or in LLaVA's words if it has none.

        Args:
            processor: a Hugging Face processor for images and text.
            row: which question.
        """
        asked = self.questions[row] + (f"\n{self.suffix}" if self.suffix else "")
        count = len(self.images[row])
        if getattr(processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": asked}]
            turn = {"role": "user", "content": content}
            return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return f"USER: {(processor.image_token + chr(10)) * count}{asked} ASSISTANT:"

    def batches(self, loaded: Any, batch_size: int = 16) -> Iterator[Batch]:
        """The sample in order, as a model takes it.

        Args:
            loaded: anything with a Hugging Face processor for images and text as ``processor``.
            batch_size: questions a batch; the last one may be smaller.

        Raises:
            ValueError: ``batch_size`` below 1, nothing with a processor, or one without image processor or tokenizer.
        """
        check.whole("batch_size", batch_size)
        processor = getattr(loaded, "processor", None)
        if processor is None:
            raise ValueError(f"batches takes what kr.load returns, which has a processor; got {type(loaded).__name__}")
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(f"questions about images need a processor for both; got {type(processor).__name__}")
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            text = [self.prompt(processor, i) for i in rows]
            begins = getattr(processor.tokenizer, "bos_token", None)
            made = processor(
                images=[[image.convert("RGB") for image in self.images[i]] for i in rows],
                text=text,
                # some templates write the first token themselves; a second one would shift every answer
                add_special_tokens=not (begins and all(line.startswith(begins) for line in text)),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            yield Batch(dict(made), rows)


# --- where the questions come from ------------------------------------------------------------------------------------


class _Drawn(Sequence):
    """Scenes as lists of one PIL image."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy())]


class _Stored(Sequence):
    """Rows of a column of a data set as lists of PIL images."""

    def __init__(self, data: datasets.Dataset, column: str, rows: Sequence[int]):
        self.data, self.column, self.rows = data.select_columns([column]), column, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[Any]:
        found = self.data[self.rows[i]][self.column]
        return found if isinstance(found, list) else [found]


def vqa(
    name: str = "scenes",
    split: str | None = None,
    n: int = 256,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    metric: str | None = None,
    ocr: bool = False,
) -> VQA:
    """Questions about images.

    Args:
        name: "scenes" (or "llava-digits"), drawn here; "pope", "gqa", "textvqa"; or a hub data set "org/name", a local
            copy of one, a folder of parquet files <split>-*, or what ``save_to_disk`` wrote, with ":config" behind it
            if there are several.
        split: of the task; None = the one papers report, "test" where that is unknown.
        n: number of questions, a random choice from public data.
        seed: decides which; scenes are drawn from it.
        kinds: only these: of `scenes.KINDS`; POPE's category, GQA's structural type.
        metric: of public data; None = what the benchmark uses, else by the answers: ten a question "vqa", yes and no
            "yesno", others "exact".
        ocr: TextVQA with the words that an OCR system read in the prompt, which is another, easier task.

    Returns:
        The sample.

    Raises:
        ValueError: unknown name, split, kind or metric; ``n`` below 1 or above what there is; columns that do not fit.

    Example:
        >>> vqa("scenes", n=2, kinds=("place",)).questions   # doctest: +SKIP
    """
    check.whole("n", n)
    if name in EMBEDDED:
        if metric not in (None, "exact") or ocr:
            raise ValueError(f"metric={metric!r}, ocr={ocr!r}; allowed for {name!r}: metric 'exact', ocr False")
        drawn = scenes.sample(n, seed, split or "test", kinds or scenes.KINDS)
        answers = [(answer,) for answer in drawn.answers]
        images = _Drawn(drawn.pixels)
        known = {"new_tokens": 6, "truth": drawn.truth, "local": drawn.local}
        return VQA(name, split or "test", "exact", images, drawn.questions, answers, drawn.kinds, **known)
    return _public(name, split, n, seed, kinds, metric, ocr)


def _public(
    name: str, split: str | None, n: int, seed: int, kinds: Sequence[str] | None, metric: str | None, ocr: bool
) -> VQA:
    """A random sample of a public data set, or of a local copy."""
    import datasets

    known = PUBLIC.get(name)
    source, _, config = (known.hub, "", known.config) if known else name.partition(":")
    split = split or (known.split if known else "test")
    files = known.files if known and known.split == split else None
    data = _open(source, config or None, split, files)
    columns = {"question", "answers" if "answers" in data.column_names else "answer"}
    image = next((c for c in ("image", "images", "imageId") if c in data.column_names), None)
    if image is None or not columns <= set(data.column_names) or (ocr and "ocr_tokens" not in data.column_names):
        raise ValueError(
            f"task {name!r} has the columns {', '.join(data.column_names)}; needed: question, answer or answers, "
            f"image, images or imageId{', ocr_tokens' if ocr else ''}"
        )
    text = data.remove_columns([c for c in ("image", "images") if c in data.column_names])
    of_kind = _kinds(text)
    if kinds is not None:
        for kind in kinds:
            check.choice("kind", kind, tuple(sorted(set(of_kind))))
    allowed = [i for i, kind in enumerate(of_kind) if kinds is None or kind in kinds]
    if n > len(allowed):
        raise ValueError(f"n={n}; allowed: 1 to {len(allowed)}, the questions in split {split!r} of task {name!r}")
    order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = [allowed[i] for i in order.tolist()]
    text = text.select(chosen)

    answer = max(columns - {"question"})
    answers = [(a,) if isinstance(a, str) else tuple(a or ()) for a in text[answer][:]]
    if not all(map(any, answers)):
        raise ValueError(f"split={split!r} of task {name!r} has questions without an answer; allowed: another split")
    if image == "imageId":
        pictures = _open(source, (config or "").replace("instructions", "images") or None, split, None)
        place = {key: i for i, key in enumerate(pictures["id"][:])}
        missing = set(text["imageId"][:]) - place.keys()
        if missing:
            raise ValueError(f"{len(missing)} images of task {name!r} are missing, such as {min(missing)!r}")
        images = _Stored(pictures, "image", [place[key] for key in text["imageId"][:]])
    else:
        held = data.features[image]
        if not isinstance(getattr(held, "feature", held), datasets.Image):
            raise ValueError(f"column {image!r} of task {name!r} is {held}; needed: images")
        images = _Stored(data, image, chosen)
    metric = check.choice("metric", metric or (known.metric if known else words.metric_of(answers)), words.METRICS)
    questions = [q.strip() for q in text["question"][:]]
    if ocr:
        read = text["ocr_tokens"][:]
        questions = [f"{q}\nReference OCR token: {', '.join(r)}" for q, r in zip(questions, read, strict=True)]
    return VQA(name, split, metric, images, questions, answers, [of_kind[i] for i in chosen], SHORT)


def _open(name: str, config: str | None, split: str, files: str | None) -> datasets.Dataset:
    """One split of a hub data set or of a local folder."""
    import datasets

    folder = Path(name) / (config or "")
    local = Path(name).is_dir()
    try:
        if local and any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"splits: {', '.join(found)}")
                found = found[split]
            return found
        source = {"path": name, "name": config}
        if local and not (Path(name) / "README.md").is_file():  # which says what the splits of a copy are called
            source, files = {"path": str(folder)}, files or f"**/{split}-*"
        return datasets.load_dataset(**source, split=split, data_files={split: files} if files else None)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        known = ", ".join(map(repr, (EMBEDDED[0], *PUBLIC)))
        raise ValueError(
            f"questions {name!r}{f' with config {config!r}' if config else ''} and split {split!r} could not be "
            f"opened; allowed: {known}, a folder with such data, or a hub data set 'org/name:config' ({error})"
        ) from error


def _kinds(text: datasets.Dataset) -> list[str]:
    """Kind of every row: POPE's category, GQA's structural type, else "all"."""
    for column in ("kind", "category", "types"):
        if column in text.column_names:
            return [(row or {}).get("structural", "all") if column == "types" else row for row in text[column][:]]
    return ["all"] * len(text)
