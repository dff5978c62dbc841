"""TensorRT-RTX for tests: skipped where it is missing, and a failure where ``CI`` is set."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

__all__ = ["load_tensorrt"]


def load_tensorrt() -> ModuleType:
    """The bindings, which need no GPU to build."""
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    except ImportError as error:
        reason = (
            f"TensorRT-RTX is not installed ({error}): pip install 'qwen-export[tensorrt-rtx]'"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
