"""How far TensorRT's builder is, and how it is stopped.

A build is one call into C++ that takes minutes. It runs in a thread of its own, so that the caller
keeps receiving signals; the builder asks the monitor at every step whether to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

from qwen_export.progress import Advance

__all__ = ["PERCENT", "Phases", "new_monitor", "run_cancellable"]

T = TypeVar("T")

PERCENT = 100
"""Units a whole build is reported in."""
_POLL_S = 0.2


@dataclass(slots=True)
class _Phase:
    num_steps: int
    parent: str | None
    done: int = 0
    running: bool = True


@dataclass(slots=True)
class Phases:
    """The builder's phases, which nest: one step of a phase is a whole phase below it.

    The builder calls from threads of its own.
    """

    advance: Advance
    """Called with the percent gained."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set to make the builder give up at its next step."""
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _reported: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins; ``parent`` is the one it is a step of."""
        with self._lock:
            self._phases[name] = _Phase(max(1, num_steps), parent)

    def step(self, name: str, step: int) -> bool:
        """Step number ``step`` of a phase, counted from 0, is done; says whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._report()
        return not self.cancelled.is_set()

    def finish(self, name: str) -> None:
        """A phase ends, early when the build is given up."""
        with self._lock:
            if name in self._phases:
                self._phases[name].running = False

    def _report(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        percent = int(PERCENT * max(map(self._fraction, roots), default=0.0))
        # A phase that begins again leads back.
        if percent > self._reported:
            self.advance(percent - self._reported)
            self._reported = percent

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        below = [
            self._fraction(other)
            for other, each in self._phases.items()
            if each.parent == name and each.running
        ]
        return min(1.0, (phase.done + max(below, default=0.0)) / phase.num_steps)


def new_monitor(trt: ModuleType, phases: Phases) -> Any:
    """An ``IProgressMonitor``, a class that exists in TensorRT's module alone, over ``phases``."""
    base: Any = trt

    class Monitor(base.IProgressMonitor):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            base.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            phases.start(name, parent, num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            return phases.step(name, step)

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()


def run_cancellable(work: Callable[[], T], cancelled: threading.Event) -> T:
    """Do the work in another thread; whatever interrupts the wait for it stops it first.

    Args:
        work: Releases the interpreter while it runs, and ends soon when ``cancelled`` is set.
        cancelled: Set when the wait is interrupted, as by Ctrl-C.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt-build") as pool:
        # The pool does not wait for a thread whose start was interrupted: start it with no work.
        pool.submit(int).result()
        try:
            future = pool.submit(work)
            # A signal may reach another thread than this one, which must run to hear of it.
            while not wait([future], _POLL_S).done:
                pass
        except BaseException:
            cancelled.set()
            raise
        return future.result()
