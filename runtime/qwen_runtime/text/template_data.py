"""What a chat template may see: messages, tools and variables as plain JSON types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_runtime.errors import RequestError

__all__ = ["REASONING_KEYS", "plain_data", "prepare_messages"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which APIs pass the reasoning of a message, the preferred one first."""


def plain_data(value: Any, refuse_in: str | None = None) -> Any:
    """Copy a value into dicts, lists, tuples, strings, numbers, booleans and None.

    Templates come from strangers and a rich object may have methods that the sandbox knows
    nothing of. Dataclasses and pydantic models become dicts; anything else becomes a
    placeholder such as ``"<ndarray>"``, as in transformers.

    Args:
        value: What a caller passed.
        refuse_in: Refuse instead of putting a placeholder; the words name the place.

    Raises:
        RequestError: If ``refuse_in`` is given and a value is none of these.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):  # an enum or a NumPy float brings methods of its own
            return getattr(plain, f"__{plain.__name__}__")(value)
    if isinstance(value, Mapping):
        return {
            plain_data(key, refuse_in): plain_data(item, refuse_in) for key, item in value.items()
        }
    if isinstance(value, list):
        return [plain_data(item, refuse_in) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item, refuse_in) for item in value)
    if isinstance(value, np.generic):
        return plain_data(value.item(), refuse_in)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain_data(getattr(value, field.name), refuse_in) for field in fields}
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump(), refuse_in)
    if refuse_in is not None:
        raise RequestError(
            f"{refuse_in} must hold text, numbers, lists and dicts, got {type(value).__name__}; "
            "convert it first",
            param="messages",
        )
    return f"<{type(value).__name__}>"


def prepare_messages(messages: Any) -> list[dict[str, Any]]:
    """Copy a conversation into the form that templates are written for.

    Keys whose value is None are left out, since many templates would print "None". Reasoning
    given under any of its names is offered as ``reasoning_content`` and ``thinking``.

    Args:
        messages: List or tuple of dicts, dataclasses or pydantic models. Not modified.

    Returns:
        New dicts of plain JSON types.

    Raises:
        RequestError: If there is no message, or one is no dict.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError(
            f"messages must be a list of dicts, got {type(messages).__name__}; "
            "pass [{'role': 'user', 'content': ...}]",
            param="messages",
        )
    if not messages:
        raise RequestError(
            "messages must hold at least one message, got an empty conversation; "
            "pass [{'role': 'user', 'content': ...}]",
            param="messages",
        )
    return [_prepare_message(index, message) for index, message in enumerate(messages)]


def _prepare_message(index: int, message: Any) -> dict[str, Any]:
    plain = plain_data(message)
    if not isinstance(plain, dict):
        raise RequestError(
            f"messages must be dicts with a role and a content, but message {index} is "
            f"{type(message).__name__}; pass {{'role': 'user', 'content': ...}}",
            param="messages",
        )
    plain = {key: value for key, value in plain.items() if value is not None}
    for key in REASONING_KEYS:
        if key in plain:
            reasoning = plain[key]
            return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain
