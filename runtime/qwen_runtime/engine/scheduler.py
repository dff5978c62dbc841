"""Which requests run next. Knows no backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qwen_runtime.engine.models import Model
from qwen_runtime.generation.base import Feed, FloatArray, RowCopy, Step

__all__ = ["Batch", "Schedulable", "Scheduler", "SlotSource", "Task"]


class SlotSource(Protocol):
    """Where slots come from."""

    def allocate(self, count: int) -> list[int]:
        """Take free slots."""

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back."""


class Schedulable(Protocol):
    """What the scheduler needs of a request."""

    slots: list[int]

    @property
    def num_rows(self) -> int:
        """Slots it needs."""

    @property
    def finished(self) -> bool:
        """Whether it has nothing more to run."""

    @property
    def draft(self) -> Model | None:
        """The model that its steps for a draft run on."""

    def next_step(self) -> Step:
        """What it wants run next; asked once per step."""

    def fail(self, error: BaseException) -> None:
        """Take note that `next_step` raised; it is not scheduled again."""


@dataclass(slots=True, eq=False)
class Task:
    """A request's step on its way: feeds still to run, logits already there."""

    request: Schedulable
    step: Step
    copies: list[RowCopy]
    logits: list[FloatArray | None] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every feed has run."""
        return all(values is not None for values in self.logits)

    @property
    def model(self) -> Model | None:
        """The draft model that it runs on; None for the engine's own."""
        return self.request.draft if self.step.on_draft else None


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of the runner."""

    decode: bool
    """One token for every row, whose logits are wanted; else any number."""
    feeds: list[tuple[Task, int, Feed]]
    """Task, index of the feed in its step, and the feed."""
    model: Model | None = None
    """The draft model to run it on; None for the engine's own."""

    @property
    def tasks(self) -> list[Task]:
        """The tasks it has feeds of, each once."""
        return list({id(task): task for task, _, _ in self.feeds}.values())


class Scheduler:
    """Admits every request at once; prefills before it decodes; models take turns.

    ::

        waiting -> running: slots, one task -> batch of prefill feeds | batch of decode feeds
    """

    def __init__(self, slots: SlotSource) -> None:
        self._slots = slots
        self._waiting: deque[Schedulable] = deque()
        self._running: list[Schedulable] = []
        self._tasks: dict[int, Task] = {}
        self._turns: list[Model | None] = []

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold slots."""
        return len(self._running)

    @property
    def completed(self) -> list[Task]:
        """Tasks all of whose feeds have run, and that `advance` has not been told of."""
        return [task for task in self._tasks.values() if task.complete]

    def add(self, request: Schedulable) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def admit(self) -> list[Schedulable]:
        """Give waiting requests their slots; returns those that were admitted."""
        admitted = []
        while self._waiting:
            request = self._waiting.popleft()
            request.slots = self._slots.allocate(request.num_rows)
            self._running.append(request)
            admitted.append(request)
        return admitted

    def schedule(self) -> Batch | None:
        """Pick what runs next.

        Returns:
            Of the model whose turn it is: all prefill feeds that are due, else all decode feeds.
            None if nothing is due.
        """
        prefill: dict[Model | None, list[tuple[Task, int, Feed]]] = {}
        decode: dict[Model | None, list[tuple[Task, int, Feed]]] = {}
        for request in self._running:
            task = None if request.finished else self._task(request)
            if task is None:
                continue
            for index, feed in enumerate(task.step.feeds):
                if task.logits[index] is None:
                    single = len(feed.tokens) == 1 and feed.want == 1
                    due = decode if single else prefill
                    due.setdefault(task.model, []).append((task, index, feed))
        model = self._take_turn([*dict.fromkeys([*prefill, *decode])])
        if model in prefill:
            return Batch(decode=False, feeds=prefill[model], model=model)
        return Batch(decode=True, feeds=decode[model], model=model) if decode else None

    def finish(self, request: Schedulable) -> None:
        """Take a request's slots back; a request that holds none is left alone."""
        self._tasks.pop(id(request), None)
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
            self._slots.release(request.slots)
            request.slots = []

    def advance(self, request: Schedulable) -> None:
        """Forget a request's completed step, so that its next one is asked for."""
        self._tasks.pop(id(request), None)

    def _take_turn(self, due: list[Model | None]) -> Model | None:
        """The model that ran longest ago of those with something to run."""
        waited = [model for model in self._turns if model in due]
        fresh = [model for model in due if model not in waited]
        order = fresh + waited
        if not order:
            return None
        self._turns = [*order[1:], order[0]]
        return order[0]

    def _task(self, request: Schedulable) -> Task | None:
        task = self._tasks.get(id(request))
        if task is None:
            try:
                step = request.next_step()
                task = Task(request, step, list(step.copies), [None] * len(step.feeds))
                self._tasks[id(request)] = task
            except BaseException as error:  # noqa: BLE001 - a caller's code: even SystemExit is its own
                request.fail(error)
                return None
        return task
