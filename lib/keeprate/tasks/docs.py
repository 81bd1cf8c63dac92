"""English reference text that every installation carries: the docstrings of its packages and Python's own topics.

Nothing is stored or downloaded: the text is read from the sources with `ast`, without importing them. It therefore
differs a little between versions of Python and packages; `fingerprint` says which text is in use.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import tempfile
import warnings
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keeprate import check

PACKAGES = {  # import name: name of the distribution
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "torch": "torch",
    "transformers": "transformers",
}
# The test split: whole subpackages, unknown from training; few, so that they are read in a second.
HELD_OUT = (
    "numpy/linalg",
    "scipy/integrate",
    "sklearn/cluster",
    "sklearn/tree",
    "pandas/plotting",
    "torch/distributions",
    "transformers/pipelines",
)
SPLITS = ("train", "test")
_ROOT = Path(__file__).resolve().parents[3]  # of the repository, if the package lies in it
_CACHE = (_ROOT / "runs" if (_ROOT / "pyproject.toml").is_file() else Path(tempfile.gettempdir()) / "keeprate") / "docs"
_SKIPPED = {"tests", "testing", "externals", "_vendor", "__pycache__"}  # no reference text, or somebody else's


def _sources(split: str) -> list[tuple[str, Path]]:
    """The split's Python files as (path below site-packages, path), sorted."""
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package {package!r} is not installed; needed: {', '.join(PACKAGES.values())}")
        home = Path(spec.submodule_search_locations[0])
        held_out = [home.parent / part for part in HELD_OUT if part.startswith(f"{package}/")]
        for top in held_out if split == "test" else [home]:
            for folder, below, files in os.walk(top):
                below[:] = sorted(
                    name
                    for name in below
                    if name not in _SKIPPED and (split == "test" or Path(folder, name) not in held_out)
                )
                paths = [Path(folder, name) for name in files if name.endswith(".py")]
                found += [(path.relative_to(home.parent).as_posix(), path) for path in paths]
    return sorted(found)


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a source file, in the order of its lines."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and files for another Python
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for text in map(ast.get_docstring, nodes) if text]


@lru_cache
def documents(split: str = "test") -> tuple[str, ...]:
    """The reference text, one document for every source file with docstrings and every topic of Python's `help`.

    A docstring that occurred before is left out, and so is one of the training files that the test files hold too.

    Args:
        split: "train" or "test". Training text takes half a minute to read, test text about a second.

    Returns:
        The documents, in an order that only depends on their names.

    Raises:
        ValueError: Unknown split, or a package is not installed.
    """
    check.choice("split", split, SPLITS)
    from pydoc_data.topics import topics

    chosen, seen = [], {text for document in _parts("test") for text in document} if split == "train" else set()
    for document in _parts(split):
        new = [text for text in dict.fromkeys(document) if text not in seen]
        seen.update(new)
        if new:
            chosen.append("\n\n".join(new))
    for name in sorted(topics):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 32  # one in eight
        if held_out == (split == "test"):
            chosen.append(topics[name].strip())
    return tuple(chosen)


@lru_cache
def _parts(split: str) -> tuple[list[str], ...]:
    return tuple(_docstrings(path) for _, path in _sources(split))


def fingerprint(split: str = "test") -> dict[str, Any]:
    """What identifies the text in use.

    Args:
        split: "train" or "test".

    Returns:
        sha256 of the text, its number of documents and characters, and the versions of Python and the packages.
    """
    check.choice("split", split, SPLITS)
    stored = _cached(split, "json")
    if split == "train" and stored.is_file():
        return json.loads(stored.read_text())
    text = documents(split)
    found = {
        "sha256": hashlib.sha256("\0".join(text).encode()).hexdigest(),
        "documents": len(text),
        "characters": sum(map(len, text)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES.values()},
    }
    if split == "train":
        stored.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=stored.parent, suffix=".part", delete=False) as part:
            json.dump(found, part)
        os.replace(part.name, stored)
    return found


def differs(card: dict[str, Any]) -> str:
    """How the text in use differs from the one a model was measured on.

    Args:
        card: of an embedded model, with `fingerprint("test")` as `card["data"]["test"]`.

    Returns:
        One sentence to print beside results; "" if the text is the same.
    """
    stored, found = card["data"]["test"], fingerprint("test")
    if stored["sha256"] == found["sha256"]:
        return ""
    changed = {
        name: f"{name} {stored['versions'].get(name)} -> {now}"
        for name, now in found["versions"].items()
        if stored["versions"].get(name) != now
    }
    return (
        "The reference text differs from the one in the model's card "
        f"({', '.join(changed.values()) or 'same versions'}): expect slightly other numbers."
    )


@lru_cache(maxsize=4)
def tokens(tokenizer: Any, split: str = "test") -> Tensor:
    """The text as one stream of tokens; every document ends with EOS.

    Args:
        tokenizer: a Hugging Face tokenizer.
        split: "train" or "test". Tokens of the training text are kept in `runs/docs`.

    Returns:
        int64 [tokens].

    Raises:
        ValueError: Unknown split.
    """
    if check.choice("split", split, SPLITS) == "test":
        return torch.from_numpy(_encode(tokenizer, documents(split)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cached = _cached(split, "npy", backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items())))
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".part", delete=False) as part:
            np.save(part, _encode(tokenizer, documents(split)).astype(np.int32))
        os.replace(part.name, cached)
    return torch.from_numpy(np.load(cached, allow_pickle=False).astype(np.int64))


def _cached(split: str, kind: str, about: str = "") -> Path:
    """File in which something that was made of the split is kept; its name changes with the sources."""
    sizes = [f"{name} {path.stat().st_size}" for name, path in _sources(split)]
    told = "\0".join([platform.python_version(), Path(__file__).read_text(), about, *sizes])
    return _CACHE / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.{kind}"


def _encode(tokenizer: Any, text: tuple[str, ...]) -> np.ndarray:
    ids = tokenizer(list(text), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.asarray(document + end, dtype=np.int64) for document in ids])


def first_token(tokenizer: Any) -> int:
    """The token at position 0 of every sequence: BOS, or EOS for tokenizers that have none.

    Raises:
        ValueError: The tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither BOS nor EOS; one of them is needed at position 0")


def windows(tokenizer: Any, rng: np.random.Generator, n: int, length: int, split: str = "test") -> Tensor:
    """Random stretches of the text, without BOS.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rng: source of chance.
        n: number of stretches.
        length: tokens of each.
        split: "train" or "test".

    Returns:
        int64 [n, length].

    Raises:
        ValueError: ``n`` or ``length`` below 1, ``length`` above the number of tokens, unknown split.
    """
    stream = tokens(tokenizer, split)
    if check.whole("length", length) >= len(stream):
        raise ValueError(f"length={length}; allowed: below {len(stream)}, the tokens of split {split!r}")
    start = torch.from_numpy(rng.integers(len(stream) - length, size=check.whole("n", n)))
    return stream[start[:, None] + torch.arange(length)]


def text(tokenizer: Any, n: int = 16, length: int = 1024, seed: int = 0, split: str = "test") -> Tensor:
    """Reference text as a model takes it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        n: number of sequences.
        length: tokens of each, BOS included.
        seed: decides which stretches.
        split: "train" or "test" (held out).

    Returns:
        int64 [n, length], BOS at position 0.

    Raises:
        ValueError: ``n`` below 1, ``length`` below 2 or above the text's, unknown split.
    """
    check.whole("length", length, 2)
    rng = np.random.default_rng([seed, SPLITS.index(check.choice("split", split, SPLITS))])
    body = windows(tokenizer, rng, n, length - 1, split)
    return torch.cat([torch.full((n, 1), first_token(tokenizer)), body], dim=1)
