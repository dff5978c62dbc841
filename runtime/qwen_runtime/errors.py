"""What the runtime raises.

QwenRuntimeError
├── RequestError (also ValueError)     an argument of a request is wrong; .param names it
│   └── CapacityError                  a request is larger than a limit of the bundle or queue
│       ├── QueueFullError             as many requests wait as may; try again later
│       └── EngineClosedError          the service takes no more requests
├── BundleError                        a bundle's files are missing, damaged or refused; .path
└── BackendError                       the engine below (ONNX Runtime, ...) failed
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "EngineClosedError",
    "QueueFullError",
    "QwenRuntimeError",
    "RequestError",
]


class QwenRuntimeError(Exception):
    """Base of everything the runtime raises on purpose."""


class RequestError(QwenRuntimeError, ValueError):
    """An argument of a request is wrong.

    Attributes:
        param: Name of the argument as the caller typed it, or None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(RequestError):
    """A request asks for more tokens, rows or room than a limit allows."""


class QueueFullError(CapacityError):
    """As many requests wait as may; the same request may be accepted later."""


class EngineClosedError(CapacityError):
    """The service is drained or closed and takes no more requests."""


class BundleError(QwenRuntimeError):
    """A bundle cannot be used: missing, damaged, too new, or refused.

    Attributes:
        path: The file or folder at fault, or None.
    """

    def __init__(self, message: str, *, path: str | Path | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class BackendError(QwenRuntimeError):
    """The engine that executes the graphs failed or is not installed."""
