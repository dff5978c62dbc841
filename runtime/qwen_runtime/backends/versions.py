"""The onnxruntime that is installed, and whether it is new enough."""

from __future__ import annotations

from typing import Any

from qwen_runtime.errors import BackendError

__all__ = ["import_onnxruntime", "require_version"]


def import_onnxruntime(minimum: str | None) -> Any:
    """The module, if it is there and new enough.

    Args:
        minimum: The oldest version that a bundle runs on; None for any.

    Raises:
        BackendError: If it is missing or older.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            "onnxruntime must be installed to run a bundle on the CPU: "
            "pip install 'qwen-export[cpu]'"
        ) from error
    require_version(ort.__version__, minimum, "cpu")
    return ort


def require_version(found: str, minimum: str | None, extra: str) -> None:
    """Refuse an onnxruntime that is too old.

    Args:
        found: Its version.
        minimum: The oldest that a bundle runs on; None for any.
        extra: The extra that brings a newer one.

    Raises:
        BackendError: If it is older.
    """
    if minimum is not None and _version(found) < _version(minimum):
        raise BackendError(
            f"onnxruntime must be at least {minimum} for this bundle, got {found}: "
            f"pip install -U 'qwen-export[{extra}]'"
        )


def _version(text: str) -> tuple[int, ...]:
    parts = (part for part in text.split("+")[0].split("."))
    return tuple(int(part) for part in parts if part.isdigit())
