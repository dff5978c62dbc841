"""One engine, used by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.engine.engine import Engine, Request
from qwen_runtime.engine.models import Model
from qwen_runtime.engine.prefix import KEPT_SLOTS
from qwen_runtime.errors import BackendError
from qwen_runtime.generation.base import Decoding

__all__ = ["EngineDriver"]


class EngineDriver:
    """Submits requests and steps the engine; any thread's step serves the requests of all.

    Args:
        runner: What executes the graphs; closed with the driver.
        kept_slots: See `Model`.
    """

    def __init__(self, runner: ModelRunner, *, kept_slots: int = KEPT_SLOTS) -> None:
        self._engine = Engine(runner, kept_slots=kept_slots)
        # Taken again by a thread whose callback uses the engine inside of a step.
        self._lock = threading.RLock()
        self._busy = False

    @property
    def model(self) -> Model:
        """The runner and its slots, for engines that draft with it."""
        return self._engine.model

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return self._engine.num_requests

    def drain(
        self,
        decodings: Sequence[Decoding],
        draft: Model | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Run state machines until all are done; cancel them if that is interrupted.

        Args:
            decodings: The state machines.
            draft: The model that their draft steps run on.
            cancel: Finishes them within one step when another thread sets it.

        Raises:
            BackendError: If the engine fails, or is closed.
            Exception: What a caller's processor, criterion or streamer raised.
        """
        requests = [Request(decoding, draft=draft) for decoding in decodings]
        try:
            self._submit(requests)
            while not all(request.done.is_set() for request in requests):
                with self._entered():
                    _pass_on(cancel, requests)
                    if not all(request.done.is_set() for request in requests):
                        self._step()
                _raise_first(requests)
            _raise_first(requests)
        except BaseException:
            self._cancel(requests)
            self.settle()
            raise

    def run(
        self,
        decoding: Decoding,
        draft: Model | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[None]:
        """Run one state machine and give back control after each of its steps.

        Closing the iterator cancels it. Arguments and errors are those of `drain`.
        """
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += 1

        request = Request(decoding, count, draft)
        seen = 0
        try:
            self._submit([request])
            while not request.done.is_set():
                with self._entered():
                    _pass_on(cancel, [request])
                    if steps == seen and not request.done.is_set():
                        self._step()
                if steps != seen:
                    seen = steps
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
        """Release the runner; requests fail afterwards. Safe to call twice."""
        with self._entered():
            self._engine.model.close()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Hold the lock, and let finalisers know that this thread is inside an engine."""
        _thread.depth += 1
        try:
            with self._lock:
                yield
        finally:
            _thread.depth -= 1

    def _submit(self, requests: Sequence[Request]) -> None:
        with self._entered():
            if self._engine.model.closed:
                raise BackendError("the LLM is closed; open the bundle again")
            for request in requests:
                self._engine.add(request)

    @staticmethod
    def _cancel(requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.done.is_set():
                request.cancel()

    def _settle(self, *, wait: bool) -> None:
        if not self._lock.acquire(blocking=wait):
            return  # whoever steps retires them
        _thread.depth += 1
        try:
            if not self._busy:
                self._work(self._engine.retire_cancelled)
        finally:
            _thread.depth -= 1
            self._lock.release()

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


def _raise_first(requests: Sequence[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error


def _pass_on(cancel: threading.Event | None, requests: Sequence[Request]) -> None:
    if cancel is not None and cancel.is_set():
        for request in requests:
            request.cancel()
