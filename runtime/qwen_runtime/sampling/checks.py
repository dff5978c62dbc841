"""Checks of processor arguments, shared by their constructors."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qwen_runtime.errors import RequestError

__all__ = ["check_fraction", "check_int", "check_positive_float", "token_ids"]


def check_int(value: object, *, name: str, minimum: int) -> int:
    """Return an integer of at least ``minimum``.

    Raises:
        RequestError: Naming ``name``, if it is anything else (bool included).
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise RequestError(f"{name} must be an integer >= {minimum}, got {value!r}", param=name)
    return value


def check_positive_float(value: object, *, name: str, hint: str = "") -> float:
    """Return a finite float above zero; an int is refused, as in transformers.

    Raises:
        RequestError: Naming ``name``, if it is anything else.
    """
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            hint = f"; write {value}.0"
        raise RequestError(f"{name} must be a finite float > 0, got {value!r}{hint}", param=name)
    return value


def check_fraction(
    value: object, *, name: str, low: float = 0.0, open_low: bool = False, open_high: bool = False
) -> float:
    """Return a number between ``low`` and 1 as a float, the ends included unless open.

    Raises:
        RequestError: Naming ``name``, if it is anything else.
    """
    interval = f"{'(' if open_low else '['}{low:g}, 1{')' if open_high else ']'}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        above = number > low if open_low else number >= low
        below = number < 1 if open_high else number <= 1
        if above and below:
            return number
    raise RequestError(f"{name} must be a number in {interval}, got {value!r}", param=name)


def token_ids(value: int | Iterable[int], *, name: str) -> list[int]:
    """Return one id or several as a list of non-negative ids.

    Raises:
        RequestError: Naming ``name``, if an id is negative or not an integer.
    """
    ids = [value] if isinstance(value, int) else list(value)
    for token_id in ids:
        check_int(token_id, name=name, minimum=0)
    return ids
