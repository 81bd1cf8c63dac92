"""What every method is: a frozen dataclass of the paper's hyper-parameters that is called on a model."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pandas as pd

from keeprate.check import choice, unknown

_registry: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Method:
    """Base of all methods. `repr` is enough to rebuild one; calling it on a model gives a context manager."""

    family: ClassVar[str] = ""
    info: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """Class name, which is the paper's name of the method."""
        return type(self).__name__

    def params(self) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def register(*, kind: str, needs: tuple[str, ...] = (), reconstructed: bool = False):
    """Class decorator that puts a method into the table of `kr.methods()`; the paper stands in data/papers.yaml.

    Args:
        kind: "pruning", "merging", "baseline" ...: what becomes of the tokens that are not kept.
        needs: What it reads: "attention rows", "received attention", "attention matrix", "keys", "values", "features".
        reconstructed: True when rebuilt from a description without seeing formula or code.
    """

    def wrap(cls: type[Method]) -> type[Method]:
        held = _registry.get(cls.__name__)
        if held is not None and held.__module__ != cls.__module__:  # running a notebook's cell again is no clash
            raise ValueError(f"a method called {cls.__name__} is registered already, by {held.__module__}")
        cls.info = {"kind": kind, "needs": ", ".join(needs), "reconstructed": reconstructed}
        _registry[cls.__name__] = cls
        return cls

    return wrap


def methods(family: str | None = None) -> pd.DataFrame:
    """Table of all methods.

    Args:
        family: Only this family; all when None.

    Returns:
        DataFrame with columns name, family, paper, arxiv, year, kind, needs, architectures, reconstructed.

    Raises:
        ValueError: On an unknown family.

    Example:
        >>> list(methods("vit")["name"])[:2]   # doctest: +SKIP
    """
    if family is not None:
        choice("family", family, tuple(sorted({cls.family for cls in _registry.values()})))
    known = papers()
    rows = []
    for name, cls in sorted(_registry.items(), key=lambda item: (item[1].family, item[0].lower())):
        if family in (None, cls.family):
            paper = known.get(name, {})
            row = {"name": name, "family": cls.family, "paper": paper.get("title", ""), **cls.info}
            row |= {"arxiv": paper.get("arxiv") or "", "year": paper.get("year")}
            rows.append(row | {"architectures": ", ".join(cls.architectures())})
    columns = ["name", "family", "paper", "arxiv", "year", "kind", "needs", "architectures", "reconstructed"]
    return pd.DataFrame(rows, columns=columns).astype({"year": "Int64"})  # a baseline has no year


def papers() -> dict[str, dict[str, Any]]:
    """Where each method was published, by class name: title, arxiv, year, venue (data/papers.yaml)."""
    from keeprate import project  # needs pydantic, which a training machine may lack

    return project.read_yaml(project.root() / "data" / "papers.yaml")


def method(name: str, **params: Any) -> Method:
    """Build a method by name.

    Raises:
        ValueError: On an unknown method or an unknown parameter; lists what is allowed.

    Example:
        >>> method("TopK", keep=0.5)   # doctest: +SKIP
    """
    if name not in _registry:
        raise ValueError(unknown("method", name, _registry))
    allowed = [f.name for f in fields(_registry[name])]
    for given in params:
        if given not in allowed:
            raise ValueError(f"{name}: {unknown('parameter', given, allowed)}")
    return _registry[name](**params)
