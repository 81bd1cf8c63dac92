"""Checks of arguments whose errors say what was given and what is allowed."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float if it lies in (0, 1].

    Raises:
        ValueError: Otherwise.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1]; got {_told(value)}")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`.

    Raises:
        ValueError: Otherwise.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float if it is a number in [low, high]; infinity is none.

    Raises:
        ValueError: Otherwise.
    """
    value = plain(value)
    real = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not real or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}]; got {value!r}")
    return float(value)


def choice(name: str, value: Any, allowed: tuple) -> Any:
    """Return `value` if it is one of `allowed`.

    Raises:
        ValueError: Otherwise.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def plain(value: Any) -> Any:
    """Python's own number for one of numpy's, as loops over `np.arange` give them; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _told(value: Any) -> str:
    """`repr`, shortened: that of a model, given where a number belongs, fills the screen."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ... ({type(value).__name__})"


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """The message for a name that does not exist: what was given, the closest one, all that are allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(given, allowed, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {given!r}{hint} Allowed: {', '.join(allowed) or 'none'}"
