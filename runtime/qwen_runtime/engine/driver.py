"""One engine, used by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.engine.engine import Engine, Request
from qwen_runtime.engine.models import Model
from qwen_runtime.errors import BackendError
from qwen_runtime.generation.base import Decoding

__all__ = ["EngineDriver"]


class EngineDriver:
    """Submits requests and steps the engine; any thread's step serves the requests of all.

    Args:
        runner: What executes the graphs; closed with the driver.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._engine = Engine(runner)
        # Taken again by the same thread when a forgotten stream is collected inside a step.
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
        with self._lock:
            self._require_open()
            requests = [self._engine.submit(decoding, draft=draft) for decoding in decodings]
        try:
            for request in requests:
                while not request.done.is_set():
                    with self._lock:
                        _pass_on(cancel, requests)
                        if not request.done.is_set():
                            self._step()
        except BaseException:
            self._cancel(requests)
            raise
        for request in requests:
            if request.error is not None:
                raise request.error

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

        with self._lock:
            self._require_open()
            request = self._engine.submit(decoding, count, draft=draft)
        seen = 0
        try:
            while not request.done.is_set():
                with self._lock:
                    _pass_on(cancel, [request])
                    if steps == seen and not request.done.is_set():
                        self._step()
                if steps != seen:
                    seen = steps
                    yield
        finally:
            self._cancel([request])
        if request.error is not None:
            raise request.error

    def close(self) -> None:
        """Release the runner; requests fail afterwards. Safe to call twice."""
        with self._lock:
            self._engine.model.close()

    def _cancel(self, requests: Sequence[Request]) -> None:
        with self._lock:
            for request in requests:
                if not request.done.is_set():
                    request.cancel()
            if not self._busy:  # the step around this call retires them otherwise
                self._engine.retire_cancelled()

    def _step(self) -> None:
        self._busy = True
        try:
            self._engine.step()
        finally:
            self._busy = False
        self._engine.retire_cancelled()

    def _require_open(self) -> None:
        if self._engine.model.closed:
            raise BackendError("the LLM is closed; open the bundle again")


def _pass_on(cancel: threading.Event | None, requests: Sequence[Request]) -> None:
    if cancel is not None and cancel.is_set():
        for request in requests:
            request.cancel()
