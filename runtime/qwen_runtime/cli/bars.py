"""Progress of a long check, on stderr."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import click

__all__ = ["Bars"]


class Bars:
    """One bar per step; a line per step where stderr is no terminal."""

    def __init__(self) -> None:
        self._label: str | None = None
        self._bar: Any = None
        self._open = ExitStack()

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of the step ``label`` are done."""
        if label != self._label:
            self._open.close()
            self._label = label
            self._bar = self._open.enter_context(
                click.progressbar(length=total, label=label, file=sys.stderr)
            )
        self._bar.update(done - self._bar.pos)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()
