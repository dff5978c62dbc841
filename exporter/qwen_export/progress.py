"""Progress of long steps: a bar on a terminal's stderr, a line per step elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Advance", "Progress", "console_progress", "no_progress"]

Advance = Callable[[int], None]
"""Called with the amount done since the last call."""


class Progress(Protocol):
    """Opens a step; the step's context yields a function that advances it."""

    def __call__(
        self, label: str, total: int | None = None, *, unit: str = ""
    ) -> AbstractContextManager[Advance]:
        """Begin a step of ``total`` units ("B" for bytes), or of unknown length."""


@contextmanager
def no_progress(label: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
    """Report nothing."""
    yield lambda _: None


@contextmanager
def console_progress(label: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
    """Report to stderr, so that stdout holds the result alone."""
    if not sys.stderr.isatty():
        print(label, file=sys.stderr, flush=True)  # noqa: T201 - this is the console
        yield lambda _: None
        return
    # rich draws the bar; imported here so that --help stays fast.
    from rich import progress as bars
    from rich.console import Console

    amount: bars.ProgressColumn = (
        bars.DownloadColumn() if unit == "B" else bars.MofNCompleteColumn()
    )
    columns: list[bars.ProgressColumn] = [
        bars.TextColumn("{task.description:<28}"),
        bars.BarColumn(),
        *([amount] if total is not None else []),
        bars.TimeElapsedColumn(),
    ]
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
        bar.update(task, total=total or 1, completed=total or 1)
