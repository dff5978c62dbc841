"""``qwen-run``: run bundles from the command line."""

from __future__ import annotations

from qwen_runtime.cli.main import main

__all__ = ["main"]
