"""One engine, used by several threads at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.engine.engine import Engine
from qwen_runtime.engine.fair_lock import FairLock
from qwen_runtime.engine.limits import EngineLimits
from qwen_runtime.engine.models import Model
from qwen_runtime.engine.prefix import KEPT_SLOTS
from qwen_runtime.engine.pump import Pump
from qwen_runtime.engine.request import Request
from qwen_runtime.engine.stats import EngineStats
from qwen_runtime.errors import BackendError

__all__ = ["EngineDriver"]


class EngineDriver:
    """Submits requests and sees to it that the engine steps, one thread at a time.

    A step serves the requests of all. Who waits for a request (`drain`, `run`) steps, in turns with
    others; requests that nobody waits for (`submit`) are the engine's own thread's.

    Args:
        runner: What executes the graphs; closed with the driver.
        kept_slots: See `Model`.
        limits: How much runs at once and may wait.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        kept_slots: int = KEPT_SLOTS,
        limits: EngineLimits | None = None,
    ) -> None:
        self._engine = Engine(runner, kept_slots=kept_slots, limits=limits)
        # Taken again by a thread whose callback uses the engine inside of a step.
        self._lock = FairLock()
        self._busy = False
        self._pump = Pump(self._step_for_background, "qwen-engine")
        weakref.finalize(self, self._pump.stop)

    @property
    def model(self) -> Model:
        """The runner and its slots, for engines that draft with it."""
        return self._engine.model

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return self._engine.num_requests

    @property
    def alive(self) -> bool:
        """Whether requests are served: not closed, and the engine's thread has not died."""
        return not self._engine.model.closed and self._pump.alive

    def stats(self) -> EngineStats:
        """What the engine is at and has done; from any thread, waits for nothing."""
        return self._engine.stats()

    def submit(self, requests: Sequence[Request]) -> None:
        """Have the engine's own thread run requests; returns at once.

        Args:
            requests: Made with ``background``.

        Raises:
            QueueFullError: If too many wait.
            CapacityError: If one can never run.
            BackendError: If the engine is closed, or its thread has died.
        """
        if not self._engine.model.closed and not self._pump.alive:
            raise BackendError("the engine's thread has died; open the bundle again")
        self._add(requests)
        self._pump.wake()

    def drain(self, requests: Sequence[Request]) -> None:
        """Run requests until all are done; cancel them if that is interrupted.

        Raises:
            BackendError: If the engine fails, or is closed.
            Exception: What a caller's processor, criterion or streamer raised.
        """
        try:
            self._add(requests)
            while not all(request.done.is_set() for request in requests):
                with self._entered():
                    if not all(request.done.is_set() for request in requests):
                        self._step()
                _raise_first(requests)
            _raise_first(requests)
        except BaseException:
            self._cancel(requests)
            self.settle()
            raise

    def run(self, request: Request) -> Iterator[None]:
        """Run one request and give back control after each of its steps.

        Closing the iterator cancels it. Errors are those of `drain`.
        """
        seen = 0
        try:
            self._add([request])
            while not request.done.is_set():
                with self._entered():
                    if request.num_steps == seen and not request.done.is_set():
                        self._step()
                if request.num_steps != seen:
                    seen = request.num_steps
                    yield
        finally:
            # The collector may have come here, in the middle of anything this thread does: it
            # must neither wait nor touch an engine or a draft that is at work.
            self._cancel([request])
            if not _thread.depth:
                self._settle(wait=False)
        if request.error is not None:
            raise request.error

    def settle(self) -> None:
        """Finish cancelled requests and free their slots, unless a step around this call does."""
        self._settle(wait=not _thread.depth)

    def close(self) -> None:
        """Release the runner; requests fail, now and afterwards. Safe to call twice."""
        with self._entered():
            self._engine.model.close()
            self._engine.fail_background(BackendError("the LLM is closed; open the bundle again"))
        self._pump.stop(wait=True)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Hold the lock, and let finalisers know that this thread is inside an engine."""
        with _inside():
            depth = self._lock.depth
            try:
                self._lock.acquire()
                yield
            finally:  # also of an interruption right after it was taken
                self._lock.release_to(depth)

    def _add(self, requests: Sequence[Request]) -> None:
        with _inside():
            self._engine.add(requests)

    @staticmethod
    def _cancel(requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.done.is_set():
                request.cancel()

    def _settle(self, *, wait: bool) -> None:
        with _inside():
            depth = self._lock.depth
            try:
                # Where it is not to wait, whoever steps retires them.
                if self._lock.acquire(blocking=wait) and not self._busy:
                    self._work(self._engine.retire_cancelled)
            finally:
                self._lock.release_to(depth)

    def _step_for_background(self) -> bool:
        """A step, if a request needs one that nobody waits for."""
        with self._entered():
            if not self._engine.has_background:
                return False
            try:
                self._step()
            except BaseException as error:  # noqa: BLE001 - a bug of ours must not leave them waiting for ever
                self._engine.fail_background(error)
        return True

    def _step(self) -> None:
        self._work(self._engine.step)
        self._work(self._engine.retire_cancelled)

    def _work(self, action: Callable[[], object]) -> None:
        before, self._busy = self._busy, True
        try:
            action()
        finally:
            self._busy = before


class _Thread(threading.local):
    """What a thread is doing."""

    depth = 0
    """Engines it is inside of, one within the other."""


_thread = _Thread()


@contextmanager
def _inside() -> Iterator[None]:
    _thread.depth += 1
    try:
        yield
    finally:
        _thread.depth -= 1


def _raise_first(requests: Sequence[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error
