"""`Engine.step()`: the only loop body there is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.engine.chunks import chunk_end
from qwen_runtime.engine.limits import EngineLimits
from qwen_runtime.engine.models import Model, RowFeed
from qwen_runtime.engine.prefix import KEPT_SLOTS
from qwen_runtime.engine.request import Request
from qwen_runtime.engine.scheduler import Batch, Scheduler, Task
from qwen_runtime.engine.stats import EngineStats
from qwen_runtime.errors import BackendError, CapacityError, QueueFullError
from qwen_runtime.generation.base import Decoding, Feed, FloatArray

__all__ = ["Engine"]


class Engine:
    """Runs requests over one model's cache slots, and over those of the models they draft with.

    Not safe for use by several threads at once; `qwen_runtime.llm.LLM` holds a lock around it.

    Args:
        runner: What executes the graphs.
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
        self._limits = limits or EngineLimits()
        self._max_context = runner.limits.max_context
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self._num_generated_tokens = self._num_steps = 0
        self.model = Model(runner, kept_slots=kept_slots)
        """The runner and its slots; another engine may borrow some for drafts."""
        self._scheduler = Scheduler(self.model, self._limits)
        self._requests: list[Request] = []
        # Logits that state machines are looking at.
        self._delivering: list[FloatArray] = []
        # Set where a request found no memory, until another one is done.
        self._short_of_memory = False
        self._inbox: deque[Request] = deque()
        self._inbox_lock = threading.Lock()

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return len(self._requests) + len(self._inbox)

    @property
    def has_background(self) -> bool:
        """Whether a request is there that nobody steps for."""
        return any(request.background for request in [*self._inbox, *self._requests])

    @property
    def num_used_slots(self) -> int:
        """Cache slots in use, those that other engines borrowed included."""
        return self.model.num_used_slots

    def stats(self) -> EngineStats:
        """What it is at and has done; from any thread."""
        limits = self._limits
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._inbox),
            num_slots_used=self.num_used_slots,
            max_running=limits.max_num_seqs,
            max_waiting=limits.max_queued_requests,
            cache_tokens_used=self._scheduler.num_rows * self._scheduler.num_tokens,
            cache_tokens_limit=limits.max_cache_tokens or limits.max_num_seqs * self._max_context,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._num_steps,
        )

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
        self.add([request])
        return request

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none; any thread may call this while another steps.

        Requests that somebody waits for are one caller's list and count as one. Requests in the
        background are a service's, whose queue is bounded.

        Raises:
            QueueFullError: If too many wait.
            CapacityError: If one can never run.
            BackendError: If the model is closed. What is added before is ended by
                `fail_background` after it was closed.
        """
        for request in requests:
            request.call = request if request.background else requests[0]
        with self._inbox_lock:
            if self.model.closed:
                raise BackendError("the LLM is closed; open the bundle again")
            self._check_size(requests)
            self._check_queue(requests)
            self._inbox.extend(requests)

    def _check_size(self, requests: Sequence[Request]) -> None:
        limits = self._limits
        for request in requests:
            rows = request.num_rows
            if request.background and rows > limits.max_num_seqs:
                raise CapacityError(
                    f"a request must have at most {limits.max_num_seqs} rows (max_num_seqs), got "
                    f"{rows}; ask for fewer beams or sequences"
                )
            needed, limit = rows * request.num_tokens, limits.max_cache_tokens
            if limit is not None and needed > limit:
                raise CapacityError(
                    f"a request must need at most {limit} tokens of KV cache (max_cache_tokens), "
                    f"got {rows} rows of {request.num_tokens} tokens; ask for fewer or shorter ones",
                )

    def _check_queue(self, requests: Sequence[Request]) -> None:
        """Count who would wait if all had their turn now, in the order they came in."""
        limits, rows, tokens = self._limits, 0, 0
        queued: set[Request] = set()
        new = {request.call: request for request in reversed(requests)}
        for request in [*self._requests, *self._inbox, *reversed(new.values())]:
            first = not rows
            rows, tokens = rows + request.num_rows, max(tokens, request.num_tokens)
            if queued or not (first or limits.fits(rows, tokens)):
                queued.add(request.call)
        if len(queued) > limits.max_queued_requests:
            raise QueueFullError(
                f"at most {limits.max_queued_requests} requests may wait (max_queued_requests), "
                f"got {len(queued)}; try again later"
            )

    def step(self) -> bool:
        """Run one prefill batch or one decode batch.

        Returns:
            False when there was nothing to run.
        """
        # A callback that steps while logits are handed over: they are in a buffer of the runner's.
        lent = [(values, values.copy()) for values in self._delivering if values.flags.writeable]
        try:
            return self._step()
        finally:
            for values, copy in lent:
                values[...] = copy

    def _step(self) -> bool:
        self.retire_cancelled()
        # What a step that was interrupted left over; logits are valid until the next call.
        self._deliver_completed()
        self._admit()
        batch = self._scheduler.schedule()
        self._retire_finished()
        if batch is None:
            return False
        progress = [task.progress[index] for task, index, _ in batch.feeds]
        try:
            self._run(batch)
        except CapacityError as error:
            # The caches cannot grow as far as the longest row needs; the others fit into them, and
            # what did not run is run by the next step.
            longest = max(batch.feeds, key=lambda due: _reach(due, batch.chunk_size))
            self._fail(longest[0], error)
            return True
        except Exception as error:  # noqa: BLE001 - whatever failed, the requests in it must hear of it
            for task in batch.tasks:
                self._fail(task, error)
            return True
        except BaseException:
            # An interruption is its thread's own matter: the call is made again by the next step.
            for (task, index, _), before in zip(batch.feeds, progress, strict=True):
                task.logits[index], task.progress[index] = None, before
            raise
        self._deliver_completed()
        self._retire_finished()
        return True

    def _admit(self) -> None:
        if self._short_of_memory and self._others_run_on():
            return
        admitted = [r for r in self._scheduler.admit() if isinstance(r, Request)]
        if not admitted:
            return
        try:
            self.model.reserve()
        except Exception:  # noqa: BLE001 - whatever it was, the requests hear of it below
            self._admit_singly(admitted)
        for request in admitted:
            if request.draft is not None and request.slots:
                try:
                    request.draft_slots = request.draft.borrow(request.num_rows)
                except Exception as error:  # noqa: BLE001 - no memory for the draft's cache, or closed
                    request.fail(error)

    def _admit_singly(self, admitted: list[Request]) -> None:
        """Reserve for one after the other, so that one that is too large fails alone.

        Where others run, there may be memory for it when they are done: it waits.
        """
        for request in admitted:
            self._give_back(request)
        for index, request in enumerate(admitted):
            request.slots = self.model.allocate(request.num_rows)
            try:
                self.model.reserve()
            except Exception as error:  # noqa: BLE001 - no memory, or closed
                self._give_back(request)
                if isinstance(error, CapacityError) and self._others_run_on():
                    self._scheduler.put_back(admitted[index:])
                    self._short_of_memory = True
                    return
                request.fail(error)

    def _others_run_on(self) -> bool:
        """Whether a request has slots that it will give back without waiting for another one."""
        held = self._scheduler.holds
        return any(request.slots and not held(request) for request in self._requests)

    def _give_back(self, request: Request) -> None:
        self.model.release(request.slots)
        request.slots = []

    def _run(self, batch: Batch) -> None:
        rows = []
        copied: set[int] = set()
        for task, index, feed in batch.feeds:
            request = _request_of(task)
            slots = request.draft_slots if task.step.on_draft else request.slots
            copies = () if id(task) in copied else tuple(task.copies)
            copied.add(id(task))
            rows.append(RowFeed(slots, feed, copies, task.progress[index], batch.chunk_size))
        model = batch.model or self.model
        results = model.run(rows, decode=batch.decode)
        self._num_steps += 1
        # Decode logits live in the runner's buffer until its next call. A task's decode feeds run
        # after its prefill feeds and all at once, so they are delivered before that.
        for (task, index, feed), result in zip(batch.feeds, results, strict=True):
            # Only now: a call that was interrupted is made again, copies included.
            task.copies.clear()
            task.logits[index] = result.logits
            task.progress[index] = result.progress
            if task.step.on_draft:
                continue
            if result.num_cached:
                _request_of(task).decoding.note_cached(feed.row, result.num_cached)
                self._num_cached_tokens += result.num_cached
            if feed.past == 0 and result.logits is not None:
                self._num_prompt_tokens += len(feed.tokens)

    def _deliver_completed(self) -> None:
        while completed := self._scheduler.completed:  # a callback's step may deliver some
            task = completed[0]
            try:
                request = _request_of(task)
                # Before a callback may step: that step leaves this request alone.
                self._scheduler.hold(request)
                logits = [values for values in task.logits if values is not None]
                before, self._delivering = self._delivering, [*self._delivering, *logits]
                tokens = request.num_generated
                try:
                    request.receive(logits)
                finally:
                    self._delivering = before
                self._num_generated_tokens += request.num_generated - tokens
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
        self._take_in()
        for request in [r for r in self._requests if r.cancelled]:
            try:
                request.decoding.cancel()
            except BaseException as error:  # noqa: BLE001 - a caller's streamer may raise anything
                request.fail(error)
            self._retire(request)

    def fail_background(self, error: BaseException) -> None:
        """End the requests that nobody steps for."""
        self._take_in()
        for request in [r for r in self._requests if r.background]:
            request.fail(error)
            self._retire(request)

    def _take_in(self) -> None:
        with self._inbox_lock:
            while self._inbox:
                # It leaves last: an interruption anywhere here must not lose it.
                request = self._inbox[0]
                if request not in self._requests:
                    self._requests.append(request)
                self._scheduler.add(request)
                self._inbox.popleft()

    def _retire_finished(self) -> None:
        for request in [r for r in self._requests if r.finished]:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        self._scheduler.finish(request)
        if request.draft is not None and request.draft_slots:
            request.draft.give_back(request.draft_slots)
            request.draft_slots = []
        self._requests.remove(request)
        self._short_of_memory = False
        request.end()


def _reach(due: tuple[Task, int, Feed], chunk_size: int | None) -> int:
    """Tokens that a feed's slot is to hold after a call, nothing reused."""
    task, index, feed = due
    length = len(feed.tokens)
    if chunk_size is not None:
        length = chunk_end(task.progress[index], length, feed.want, chunk_size)
    return feed.past + length


def _request_of(task: Task) -> Request:
    request = task.request
    assert isinstance(request, Request), "an engine schedules its own requests"
    return request
