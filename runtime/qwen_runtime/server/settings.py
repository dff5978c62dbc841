"""How a server listens, whom it answers, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen_runtime.errors import RequestError

__all__ = ["ServerSettings", "read_api_keys"]

_ORIGIN = re.compile(r"https?://[^/\s]+")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server; they do not change what the model answers.

    Raises:
        RequestError: If a value is wrong; ``param`` names it.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 interface."""
    port: int = 8000
    """TCP port, 0..65535; 0 takes a free one."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients may send as ``Authorization: Bearer KEY``; empty asks for none."""
    protect_metrics: bool = False
    """Whether ``/metrics`` needs a key too."""
    page: bool = True
    """Whether ``/`` is the chat page."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, or ``*``; empty allows none."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest body of a request. The default holds a 128k-token prompt in escaped JSON."""
    served_model_name: str | None = None
    """The model's name in the API; None takes the bundle's folder name."""
    drain_seconds: float = 30.0
    """How long running requests may go on after a signal to stop; 0 ends them at once."""
    keep_alive_seconds: int = 75
    """How long an idle connection stays open. Longer than the 60 s after which common load
    balancers give one up, so that none is closed under a request on its way."""
    log_format: Literal["text", "json"] = "text"
    """Lines of the log for people, or one JSON object a line."""

    def __post_init__(self) -> None:
        _host(self.host)
        _integer("port", self.port, 0, 65535)
        _integer("max_body_bytes", self.max_body_bytes, 1)
        _integer("keep_alive_seconds", self.keep_alive_seconds, 0)
        seconds = self.drain_seconds
        if not _is_number(seconds) or not (math.isfinite(seconds) and seconds >= 0):
            raise _wrong("drain_seconds", "a finite number of seconds >= 0", seconds)
        for name in ("protect_metrics", "page"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        if self.log_format not in ("text", "json"):
            raise _wrong("log_format", '"text" or "json"', self.log_format)
        _name(self.served_model_name)
        _texts("cors_origins", self.cors_origins, _is_origin, '"*" or like https://example.com')
        _keys(self.api_keys)


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Read keys from a file: one a line; empty lines and lines that begin with # are skipped.

    Raises:
        RequestError: If the file cannot be read or holds no key. No message repeats a line.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RequestError(
            f"the file of API keys must be readable, but {path} is not: {reason}",
            param="api_key_file",
        ) from error
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise RequestError(
            f"the file of API keys must hold one key a line, but {path} holds none",
            param="api_key_file",
        )
    return keys


def _host(host: object) -> None:
    if not isinstance(host, str) or not host:
        raise _wrong("host", "an address or a host's name", host)


def _integer(name: str, value: object, least: int, most: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and isinstance(value, int) and value > most):
        limits = f">= {least}" if most is None else f"in {least}..{most}"
        raise _wrong(name, f"an integer {limits}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_origin(text: str) -> bool:
    return text == "*" or _ORIGIN.fullmatch(text) is not None


def _name(name: object) -> None:
    if name is not None and not (isinstance(name, str) and name.strip() and name.isprintable()):
        raise _wrong("served_model_name", "a printable name or None", name)


def _texts(name: str, values: object, allowed: Callable[[str], bool], form: str) -> None:
    if not isinstance(values, tuple):
        raise _wrong(name, "a tuple of texts", values)
    for value in values:
        if not isinstance(value, str) or not allowed(value):
            raise _wrong(name, form, value)


def _keys(keys: object) -> None:
    """A wrong key is named by its place: keys must not reach a log."""
    if not isinstance(keys, tuple):
        raise RequestError(
            f"api_keys must be a tuple of texts, got {type(keys).__name__}", param="api_keys"
        )
    for place, key in enumerate(keys, 1):
        # A header carries printable ASCII; spaces would be stripped on the way.
        if not isinstance(key, str) or re.fullmatch(r"[!-~]+", key) is None:
            raise RequestError(
                "api_keys must be texts of visible ASCII characters without spaces, and number "
                f"{place} is not; make a key with, say, python -m secrets",
                param="api_keys",
            )


def _wrong(name: str, form: str, value: object) -> RequestError:
    return RequestError(f"{name} must be {form}, got {value!r}", param=name)
