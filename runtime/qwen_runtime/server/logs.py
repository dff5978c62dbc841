"""The server's log: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

__all__ = ["configure_logging"]


class _JsonLines(logging.Formatter):
    """Time, level, message and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record as one line."""
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


class _TextLines(logging.Formatter):
    """Time, level and message; a request's other fields behind them."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line = super().format(record)
        fields = getattr(record, "fields", {})
        shown = {"method", "path", "status", "ms"}
        rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in shown)
        return f"{line} {rest}" if rest else line


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send this package's log and uvicorn's warnings to standard error.

    For a process that is a server; an embedding service keeps its own logging.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonLines()
        if log_format == "json"
        else _TextLines("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    for name, level in (("qwen_runtime", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
