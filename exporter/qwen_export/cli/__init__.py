"""``qwen-export``: build and examine bundles from the command line."""

from __future__ import annotations

from qwen_export.cli.main import main

__all__ = ["main"]
