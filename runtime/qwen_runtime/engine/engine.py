"""`Engine.step()`: the only loop body there is."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qwen_runtime.backends.base import FloatArray, ModelRunner
from qwen_runtime.engine.models import Model, RowFeed
from qwen_runtime.engine.prefix import KEPT_SLOTS
from qwen_runtime.engine.scheduler import Batch, Scheduler, Task
from qwen_runtime.generation.base import Decoding, Step

__all__ = ["Engine", "Request"]


class Request:
    """A submitted state machine and what became of it.

    Attributes:
        decoding: The state machine.
        slots: Cache slots it holds; empty before it is admitted and after it is done.
        draft: The model that drafts for it, or None.
        draft_slots: Cache slots it holds there.
        error: What stopped it early, or None.
        done: Set when it is finished, cancelled or failed.
    """

    def __init__(
        self,
        decoding: Decoding,
        on_step: Callable[[], None] | None = None,
        draft: Model | None = None,
    ) -> None:
        self.decoding = decoding
        self.slots: list[int] = []
        self.draft = draft
        self.draft_slots: list[int] = []
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._on_step = on_step
        self._cancelled = False

    @property
    def num_rows(self) -> int:
        """Slots it needs."""
        return self.decoding.num_rows

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

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
        if self._on_step is not None:
            self._on_step()


class Engine:
    """Runs requests over one model's cache slots, and over those of the models they draft with.

    Not safe for use by several threads at once; `qwen_runtime.llm.LLM` holds a lock around it.

    Args:
        runner: What executes the graphs.
        kept_slots: See `Model`.
    """

    def __init__(self, runner: ModelRunner, *, kept_slots: int = KEPT_SLOTS) -> None:
        self.model = Model(runner, kept_slots=kept_slots)
        """The runner and its slots; another engine may borrow some for drafts."""
        self._scheduler = Scheduler(self.model)
        self._requests: list[Request] = []

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return len(self._requests)

    @property
    def num_used_slots(self) -> int:
        """Cache slots in use, those that other engines borrowed included."""
        return self.model.num_used_slots

    def submit(
        self,
        decoding: Decoding,
        on_step: Callable[[], None] | None = None,
        *,
        draft: Model | None = None,
    ) -> Request:
        """Queue a state machine.

        Args:
            decoding: The state machine.
            on_step: Called after each of its steps; what it raises fails the request.
            draft: The model its draft steps run on; another engine's, or this one's.
        """
        request = Request(decoding, on_step, draft)
        self.add(request)
        return request

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._requests.append(request)
        self._scheduler.add(request)

    def step(self) -> bool:
        """Run one prefill batch or one decode batch.

        Returns:
            False when there was nothing to run.
        """
        self.retire_cancelled()
        # What a step that was interrupted left over; logits are valid until the next call.
        self._deliver_completed()
        self._admit()
        batch = self._scheduler.schedule()
        self._retire_finished()
        if batch is None:
            return False
        try:
            self._run(batch)
        except Exception as error:  # noqa: BLE001 - whatever failed, the requests in it must hear of it
            for task in batch.tasks:
                self._fail(task, error)
            return True
        except BaseException:
            # An interruption is its thread's own matter: the call is made again by the next step.
            for task, index, _ in batch.feeds:
                task.logits[index] = None
            raise
        self._deliver_completed()
        self._retire_finished()
        return True

    def _admit(self) -> None:
        admitted = [r for r in self._scheduler.admit() if isinstance(r, Request)]
        if not admitted:
            return
        try:
            self.model.reserve()
        except Exception:  # noqa: BLE001 - whatever it was, the requests hear of it below
            for request in admitted:
                self._give_back(request)
            # One by one, so that one that is too large fails alone.
            for request in admitted:
                request.slots = self.model.allocate(request.num_rows)
                try:
                    self.model.reserve()
                except Exception as error:  # noqa: BLE001 - no memory, or closed
                    self._give_back(request)
                    request.fail(error)
        for request in admitted:
            if request.draft is not None and request.error is None:
                try:
                    request.draft_slots = request.draft.borrow(request.num_rows)
                except Exception as error:  # noqa: BLE001 - as above, for the draft's cache
                    request.fail(error)

    def _give_back(self, request: Request) -> None:
        self.model.release(request.slots)
        request.slots = []

    def _run(self, batch: Batch) -> None:
        rows = []
        copied: set[int] = set()
        for task, _, feed in batch.feeds:
            request = _request_of(task)
            slots = request.draft_slots if task.step.on_draft else request.slots
            copies = () if id(task) in copied else tuple(task.copies)
            copied.add(id(task))
            rows.append(RowFeed(slots, feed, copies))
        model = batch.model or self.model
        results = model.run(rows, decode=batch.decode)
        # Decode logits live in the runner's buffer until its next call. A task's decode feeds run
        # after its prefill feeds and all at once, so they are delivered before that.
        for (task, index, feed), result in zip(batch.feeds, results, strict=True):
            # Only now: a call that was interrupted is made again, copies included.
            task.copies.clear()
            task.logits[index] = result.logits
            if result.num_cached and not task.step.on_draft:
                _request_of(task).decoding.note_cached(feed.row, result.num_cached)

    def _deliver_completed(self) -> None:
        for task in self._scheduler.completed:
            try:
                request = _request_of(task)
                request.receive([values for values in task.logits if values is not None])
                self._scheduler.advance(request)
            except BaseException as error:  # noqa: BLE001 - a caller's code: even SystemExit is its own
                self._fail(task, error)

    def _fail(self, task: Task, error: BaseException) -> None:
        request = _request_of(task)
        request.fail(error)
        if request in self._requests:
            self._retire(request)

    def retire_cancelled(self) -> None:
        """Finish cancelled requests and free their slots; `step` does so too."""
        for request in [r for r in self._requests if r.cancelled]:
            try:
                request.decoding.cancel()
            except BaseException as error:  # noqa: BLE001 - a caller's streamer may raise anything
                request.fail(error)
            self._retire(request)

    def _retire_finished(self) -> None:
        for request in [r for r in self._requests if r.finished]:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        self._scheduler.finish(request)
        if request.draft is not None and request.draft_slots:
            request.draft.give_back(request.draft_slots)
            request.draft_slots = []
        self._requests.remove(request)
        request.done.set()


def _request_of(task: Task) -> Request:
    request = task.request
    assert isinstance(request, Request), "an engine schedules its own requests"
    return request
