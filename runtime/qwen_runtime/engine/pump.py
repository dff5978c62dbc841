"""The engine's own thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

__all__ = ["Pump"]


class Pump:
    """Runs a method again and again while it has work, in a thread of its own.

    The thread starts when it is first woken and holds its object only while that has work, so that
    a forgotten engine is freed. A daemon: an idle engine keeps no process from ending.

    Args:
        work: A bound method that does a piece of work; False when there was none. It must not
            raise.
        name: The thread's name.
    """

    def __init__(self, work: Callable[[], bool], name: str) -> None:
        self._work = weakref.WeakMethod(work)
        self._name = name
        self._awake = threading.Event()
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs, or would when woken."""
        thread = self._thread
        return not self._stopped.is_set() and (thread is None or thread.is_alive())

    def wake(self) -> None:
        """There is work; from any thread."""
        with self._starting:
            if self._thread is None and not self._stopped.is_set():
                arguments = (self._work, self._awake, self._stopped)
                self._thread = threading.Thread(
                    target=_run, args=arguments, name=self._name, daemon=True
                )
                self._thread.start()
        self._awake.set()

    def stop(self, *, wait: bool = False) -> None:
        """End the thread after the piece of work it is at.

        Args:
            wait: Whether to wait for it; the thread does not wait for itself.
        """
        self._stopped.set()
        self._awake.set()
        thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()


def _run(
    method: weakref.WeakMethod[Callable[[], bool]],
    awake: threading.Event,
    stopped: threading.Event,
) -> None:
    while True:
        awake.wait()
        awake.clear()
        while not stopped.is_set():
            work = method()
            if work is None or not work():
                break
            del work
        work = None
        if stopped.is_set():
            return
