"""Checks of arguments whose errors say what was given and what is allowed."""

from typing import Any


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float if it lies in (0, 1].

    Raises:
        ValueError: Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1]; got {value!r}")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`.

    Raises:
        ValueError: Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    return value


def choice(name: str, value: Any, allowed: tuple) -> Any:
    """Return `value` if it is one of `allowed`.

    Raises:
        ValueError: Otherwise.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value
