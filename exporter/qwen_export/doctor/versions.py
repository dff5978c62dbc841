"""Versions of packages against the ranges that qwen-export declares."""

from __future__ import annotations

import operator
import re

__all__ = ["is_wanted"]

_OPERATORS = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
}


def is_wanted(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=1.31,<1.32"; suffixes like "+cpu" do not count."""
    for condition in filter(None, map(str.strip, wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|>|<)\s*([\d.]+)", condition)
        if match is None:
            raise ValueError(f"a version range must be made of >= > <= < ==, got {condition!r}")
        compare, limit = _OPERATORS[match[1]], _release(match[2])
        found = _release(version)
        length = max(len(found), len(limit))
        if not compare(_padded(found, length), _padded(limit, length)):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
    return numbers + (0,) * (length - len(numbers))
