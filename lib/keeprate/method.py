"""What every method is: a frozen dataclass of the paper's hyper-parameters that is called on a model."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pandas as pd

from keeprate.check import choice

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


def register(
    *,
    paper: str,
    arxiv: str = "",
    year: int | None = None,
    kind: str,
    needs: tuple[str, ...] = (),
    reconstructed: bool = False,
):
    """Class decorator that puts a method into the table of `kr.methods()`.

    Args:
        paper: Title.
        arxiv: arXiv id, empty when it has not been seen.
        year: Year of first publication.
        kind: "pruning", "merging", "baseline" ...: what becomes of the tokens that are not kept.
        needs: What it reads: "cls", "attention rows", "received attention", "attention matrix", "keys", "features".
        reconstructed: True when rebuilt from a description without seeing formula or code.
    """

    def wrap(cls: type[Method]) -> type[Method]:
        if cls.__name__ in _registry:
            raise ValueError(f"a method called {cls.__name__} is registered already")
        cls.info = {
            "paper": paper,
            "arxiv": arxiv,
            "year": year,
            "kind": kind,
            "needs": ", ".join(needs),
            "reconstructed": reconstructed,
        }
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
    rows = [
        {"name": name, "family": cls.family, **cls.info, "architectures": ", ".join(cls.architectures())}
        for name, cls in _registry.items()
        if family in (None, cls.family)
    ]
    columns = ["name", "family", "paper", "arxiv", "year", "kind", "needs", "architectures", "reconstructed"]
    return pd.DataFrame(rows, columns=columns)


def method(name: str, **params: Any) -> Method:
    """Build a method by name.

    Raises:
        ValueError: On an unknown method or an unknown parameter; lists what is allowed.

    Example:
        >>> method("TopK", keep=0.5)   # doctest: +SKIP
    """
    import difflib

    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no method called {name!r}{hint} Known: {', '.join(sorted(_registry))}")
    allowed = [f.name for f in fields(_registry[name])]
    unknown = sorted(set(params) - set(allowed))
    if unknown:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(allowed)}")
    return _registry[name](**params)
