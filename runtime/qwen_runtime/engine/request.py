"""A submitted state machine and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from qwen_runtime.engine.models import Model
from qwen_runtime.generation.base import Decoding, FloatArray, Step
from qwen_runtime.generation.rows import RowState

__all__ = ["Request"]


class Request:
    """A submitted state machine and what became of it.

    Args:
        decoding: The state machine.
        on_step: Called by the stepping thread after each of its steps; what it raises fails the
            request.
        draft: The model that drafts for it, or None.
        on_done: Called with it by the stepping thread once it is done; must not raise.
        cancel: Finishes it within one step when another thread sets it.
        background: Whether the engine's own thread runs it; else whoever waits for it does.
        num_tokens: Tokens that each of its rows may come to hold.
        rows: What its rows have generated, for the counts of `EngineStats`.

    Attributes:
        slots: Cache slots it holds; empty before it is admitted and after it is done.
        draft_slots: Cache slots it holds in the draft model.
        error: What stopped it early, or None.
        num_steps: Steps whose logits it has received.
        call: The first request of the call that it came with; itself in the background.
        done: Set when it is finished, cancelled or failed.
    """

    def __init__(
        self,
        decoding: Decoding,
        on_step: Callable[[], None] | None = None,
        draft: Model | None = None,
        *,
        on_done: Callable[[Request], None] | None = None,
        cancel: threading.Event | None = None,
        background: bool = False,
        num_tokens: int = 0,
        rows: Callable[[], Sequence[RowState]] = tuple,
    ) -> None:
        self.decoding = decoding
        self.slots: list[int] = []
        self.draft = draft
        self.draft_slots: list[int] = []
        self.background = background
        self.num_tokens = num_tokens
        self.num_steps = 0
        self.call = self
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._on_step = on_step
        self._on_done = on_done
        self._cancel_event = cancel
        self._cancelled = False
        self._rows = rows

    @property
    def num_rows(self) -> int:
        """Slots it needs."""
        return self.decoding.num_rows

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, over all rows."""
        return sum(len(row.token_ids) for row in self._rows())

    @property
    def cancelled(self) -> bool:
        """Whether it is to be cancelled."""
        return self._cancelled or (self._cancel_event is not None and self._cancel_event.is_set())

    def cancel(self) -> None:
        """Finish within one step; may be called from any thread."""
        self._cancelled = True

    def fail(self, error: BaseException) -> None:
        """Take note of what stopped it; the engine retires it."""
        self.error = error

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to run."""
        return self.error is not None or self.decoding.finished

    def next_step(self) -> Step:
        """The state machine's next step."""
        return self.decoding.next_step()

    def receive(self, logits: list[FloatArray]) -> None:
        """Hand a completed step's logits to the state machine, then tell the listener."""
        self.decoding.accept(logits)
        self.num_steps += 1
        if self._on_step is not None:
            self._on_step()

    def end(self) -> None:
        """Let everybody know that it is done."""
        self.done.set()
        if self._on_done is not None:
            self._on_done(self)
