"""The JSON of a request's body, and nothing that JSON does not allow."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

from starlette.requests import Request

from qwen_runtime.errors import RequestError
from qwen_runtime.server.errors import ApiError
from qwen_runtime.server.fields import Table

__all__ = ["parse_body", "read_body"]

T = TypeVar("T")

_MAX_DEPTH: Final = 160
"""Levels of lists and objects. A JSON schema of 64 nested schemas, the runtime's limit, has two
levels for each."""

_LONG_BODY: Final = 16_384
"""Bytes from which a body is read in a thread, at about 1 µs each: the tokens of others shall not
wait for it."""


async def read_body(request: Request, table: Table, prepare: Callable[[dict[str, Any]], T]) -> T:
    """Read the body of a request.

    Args:
        request: The request.
        table: What the body may hold.
        prepare: Called with what the table reads, for all that takes long where the body is:
            templates and token ids. A long body is read and prepared in a thread.

    Returns:
        What ``prepare`` returns.

    Raises:
        ApiError: 415 if it is not declared to be plain JSON; pages of other origins may send
            anything else without asking.
        RequestError: If it is no JSON, or naming the field at fault.
        Exception: What ``prepare`` raises.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"the body must be JSON, got Content-Type {kind!r:.80}; send "
            "Content-Type: application/json",
            None,
            "unsupported_media_type",
        )
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise ApiError(
            415,
            f"the body must be sent as it is, got Content-Encoding {coding!r:.80}; send it "
            "uncompressed",
            None,
            "unsupported_media_type",
        )
    raw = await request.body()
    if len(raw) < _LONG_BODY:
        return prepare(table.read(parse_body(raw)))
    return await asyncio.to_thread(lambda: prepare(table.read(parse_body(raw))))


def parse_body(raw: bytes) -> Any:
    """Parse JSON, strictly.

    Args:
        raw: UTF-8.

    Raises:
        RequestError: If it is no UTF-8 or no JSON, holds NaN, Infinity, a number beyond float64
            or half of a surrogate pair, or is nested too deeply.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"it is no UTF-8 text at byte {error.start}") from error
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise _refused(_DEEP) from error
    except ValueError as error:
        raise _refused(str(error)) from error
    _check_values(value, escapes="\\u" in text)
    return value


_DEEP = f"it is nested deeper than {_MAX_DEPTH} levels"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {digits:.40}, which is too large")
    return value


def _check_values(value: Any, *, escapes: bool) -> None:
    """Walk without recursion: what is refused here could end others' recursion.

    Args:
        value: A JSON value.
        escapes: Whether its text had any; only those can write half of a surrogate pair.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        if escapes:
            _check_texts(level)
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return
    raise _refused(_DEEP)


def _check_texts(values: list[Any]) -> None:
    for value in values:
        for text in value if isinstance(value, dict) else (value,):
            if isinstance(text, str):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise _refused(
                        f"a text holds half of a surrogate pair at its character {error.start}"
                    ) from error


def _refused(reason: str) -> RequestError:
    return RequestError(f"the body must be JSON, but {reason}; send valid JSON in UTF-8")
