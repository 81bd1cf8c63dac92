"""Where the project keeps its files, and what it says about each notebook: manifest, tiers, declared parameters."""

import ast
import hashlib
import io
import json
import os
import shutil
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from keeprate.check import unknown

TIERS = ("smoke", "default", "full", "paper")
OPTIONAL = ("full",)  # tiers that only some notebooks have
TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "None": None}
Model = TypeVar("Model", bound=BaseModel)


def root() -> Path:
    """The project folder: the nearest with a notebook manifest above the working directory, else this package's own.

    Raises:
        FileNotFoundError: there is none, as when the package was installed without its repository.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2]):
        if (folder / "notebooks" / "manifest.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no notebooks/manifest.yaml in {Path.cwd()} or above it: work inside a clone of the repository"
    )


# ---------------------------------------------------------------------------------------------------- small file work


def read_yaml(path: Path) -> Any:
    """Load one YAML file; what does not parse is a ValueError that names the file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None


def validated(model: type[Model], fields: Any, where: str) -> Model:
    """Build a pydantic model; complaints become one ValueError whose lines say where the data stands."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join(lines)) from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part: temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_text` of standard JSON: NaN and infinity are refused rather than written as words no parser knows."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def discard(run: Path) -> None:
    """Empty a run's folder of results, so that nothing old passes for the outcome of a run that fails."""
    (run / "results.json").unlink(missing_ok=True)
    shutil.rmtree(run / "figures", ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ manifest


class Notebook(BaseModel):
    """One entry of notebooks/manifest.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True)
    title: str
    family: str
    """The package under lib/keeprate whose changes rerun the notebook; any other word: every family's."""
    papers: list[str]
    """arXiv ids that data/papers.yaml knows."""
    models: list[str] = []
    """Embedded checkpoints it loads, folders of data/models."""
    needs: Literal["cpu", "gpu"] = "cpu"
    timing: bool = False
    """True when it measures wall-clock time: it then runs alone, with all cores."""
    minutes: dict[Literal["smoke", "default", "full", "paper"], float | None]
    """Measured run time; null until measured."""
    memory_gb: dict[Literal["smoke", "default", "full", "paper"], float | None]
    """Measured peak memory of the process; null until measured."""


def manifest() -> dict[str, Notebook]:
    """Every notebook of the project, in order.

    Returns:
        Notebook name (file name without `.ipynb`) to its entry.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type.
    """
    path = root() / "notebooks" / "manifest.yaml"
    entries = read_yaml(path) or {}
    return {name: validated(Notebook, fields, f"{path}: {name}") for name, fields in sorted(entries.items())}


def notebook_path(name: str) -> Path:
    """The source of a notebook of the project, by its name or by a path to it.

    Raises:
        ValueError: there is no such notebook.
    """
    folder = root() / "notebooks"
    name = Path(name).name.removesuffix(".ipynb")
    path = folder / f"{name}.ipynb"
    if not path.is_file():
        raise ValueError(f"{folder}: {unknown('notebook', name, (p.stem for p in folder.glob('*.ipynb')))}")
    return path


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook as plain dictionaries, each source one string."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = literal  # comment` of a notebook's parameters cell."""

    name: str
    type: str
    default: Any
    comment: str

    def check(self, value: Any) -> Any:
        """The value in the declared type: an int becomes a float where a float is declared, nothing else is converted.

        Raises:
            ValueError: the value has another type.
        """
        try:
            annotation = eval(self.type, {"__builtins__": {}}, TYPES)
            return TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            kind = type(value).__name__
            raise ValueError(f"parameter {self.name!r} must be {self.type}, got {value!r} ({kind})") from None
        except (NameError, TypeError, SyntaxError):
            raise ValueError(f"parameter {self.name!r}: type {self.type!r} is not made of {', '.join(TYPES)}") from None


def declared(path: Path) -> dict[str, Parameter]:
    """Read what a notebook declares in its cell tagged `parameters`, without running it.

    Args:
        path: the source notebook.

    Returns:
        Parameter name to its declaration, in the order of the cell.

    Raises:
        ValueError: not exactly one such cell, or a line that is not `name: type = literal`.
    """
    sources = [c["source"] for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    if len(sources) != 1:
        raise ValueError(f"{path}: {len(sources)} cells are tagged 'parameters', must be one")
    tokens = tokenize.generate_tokens(io.StringIO(sources[0]).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for line in ast.parse(sources[0]).body:
        source = ast.unparse(line)
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            raise ValueError(f"{path}: parameters cell: `{source}` is not `name: type = literal`")
        try:
            default = ast.literal_eval(line.value)
        except ValueError:
            raise ValueError(f"{path}: parameters cell: `{source}` is computed, must be a literal") from None
        name = line.target.id
        parameter = Parameter(name, ast.unparse(line.annotation), default, comments.get(line.end_lineno, ""))
        parameter.check(default)
        found[name] = parameter
    return found


def resolve(parameters: Mapping[str, Parameter], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All parameters of a run: the given ones checked by name and type, the defaults for the rest.

    Args:
        parameters: what the notebook declares.
        given: overrides.
        where: begins the error message, e.g. the tier file.

    Raises:
        ValueError: a name that is not declared, or a value of another type.
    """
    for name in given:
        if name not in parameters:
            raise ValueError(f"{where}: {unknown('parameter', name, parameters)}")
    try:
        return {name: p.check(given.get(name, p.default)) for name, p in parameters.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def tier_parameters(name: str, tier: str) -> dict[str, Any]:
    """The full parameters of a notebook in one tier: `data/tiers/<tier>/<name>.yaml` over the notebook's defaults.

    Raises:
        ValueError: no such tier or file (the default tier needs none), or a parameter that does not fit.
    """
    folder = root() / "data" / "tiers"
    path = folder / tier / f"{name}.yaml"
    if tier not in TIERS:
        raise ValueError(unknown("tier", tier, TIERS))
    if not path.is_file() and tier != "default":
        existing = sorted({"default", *(p.parent.name for p in folder.glob(f"*/{name}.yaml"))})
        raise ValueError(f"no tier file {path}; {name} has the tiers: {', '.join(existing)}")
    given = (read_yaml(path) or {}) if path.is_file() else {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must map parameter names to values, is a {type(given).__name__}")
    return resolve(declared(notebook_path(name)), given, str(path))


def digest(parameters: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for a set of parameters; part of the name of a run's folder."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]


def code_digest(name: str) -> str:
    """The same for the code behind a run: library, kernels and the notebook's own cells."""
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py")) + sorted((root() / "kernels").rglob("*.py"))
    state = hashlib.sha256()
    for source in sources:
        state.update(source.name.encode() + source.read_bytes())
    for cell in cells(notebook_path(name)):
        if cell["cell_type"] == "code":
            state.update(cell["source"].encode())
    return state.hexdigest()[:8]
