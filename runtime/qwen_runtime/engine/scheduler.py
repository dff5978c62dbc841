"""Which requests run next. Knows no backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qwen_runtime.engine.chunks import chunk_end
from qwen_runtime.engine.limits import EngineLimits
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
    def num_tokens(self) -> int:
        """Tokens that each of its rows may come to hold."""

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
    progress: list[int] = field(default_factory=list)
    """Tokens of each feed that lie in the cache."""

    @classmethod
    def of(cls, request: Schedulable, step: Step) -> Task:
        """A task of which nothing has run."""
        count = len(step.feeds)
        return cls(request, step, list(step.copies), [None] * count, [0] * count)

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
    """One token for every row, whose logits are wanted; else the next chunk of every feed."""
    feeds: list[_Due]
    """Task, index of the feed in its step, and the feed."""
    model: Model | None = None
    """The draft model to run it on; None for the engine's own."""
    chunk_size: int | None = None
    """Where its prompts are cut; None in a decode batch."""

    @property
    def tasks(self) -> list[Task]:
        """The tasks it has feeds of, each once."""
        return list({id(task): task for task, _, _ in self.feeds}.values())


class Scheduler:
    """Admits requests in the order they came in, and lets prompts and running rows take turns.

    ::

        waiting -> running: slots, one task -> batch of prefill chunks | batch of decode feeds

    While rows decode, at most one chunk of prompts runs between two of their steps, so that their
    pace is bounded whatever arrives. Prompts run in the order of admission; of several models the
    one that ran longest ago is next. So everything that was admitted gets its turn, and everything
    that waits is admitted when those before it are done.

    Args:
        slots: Where slots come from.
        limits: How much runs at once. A request that is larger alone than ``max_num_seqs`` runs
            when nothing else does.
    """

    def __init__(self, slots: SlotSource, limits: EngineLimits | None = None) -> None:
        self._slots = slots
        self._limits = limits or EngineLimits()
        self._waiting: deque[Schedulable] = deque()
        self._running: list[Schedulable] = []
        self._tasks: dict[int, Task] = {}
        self._turns: list[Model | None] = []
        self._prefilled: set[Model | None] = set()
        self._held: set[int] = set()

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
        """Tasks all of whose feeds have run, and that nobody holds."""
        return [
            task for key, task in self._tasks.items() if task.complete and key not in self._held
        ]

    def add(self, request: Schedulable) -> None:
        """Queue a request, unless it is queued already."""
        if request not in self._waiting:
            self._waiting.append(request)

    @property
    def num_rows(self) -> int:
        """Rows that hold slots."""
        return sum(request.num_rows for request in self._running)

    @property
    def num_tokens(self) -> int:
        """Tokens that the longest running row may come to hold; 0 where nothing runs."""
        return max((request.num_tokens for request in self._running), default=0)

    def admit(self) -> list[Schedulable]:
        """Give waiting requests their slots, as far as there is room; returns those admitted.

        Limits do not count where every running request is held: a callback looks at its step and
        may wait for the very request that is next.
        """
        admitted = []
        rows, tokens = self.num_rows, self.num_tokens
        while self._waiting:
            request = self._waiting[0]
            rows, tokens = rows + request.num_rows, max(tokens, request.num_tokens)
            stuck = all(self.holds(running) for running in self._running)
            if not (stuck or self._limits.fits(rows, tokens)):
                break
            self._waiting.popleft()
            request.slots = self._slots.allocate(request.num_rows)
            self._running.append(request)
            admitted.append(request)
        return admitted

    def put_back(self, requests: Sequence[Schedulable]) -> None:
        """Have requests wait that were just admitted, hold no slots, and found no memory."""
        for request in reversed(requests):
            self._running.remove(request)
            self._waiting.appendleft(request)

    def schedule(self) -> Batch | None:
        """Pick what runs next.

        Returns:
            Of the model whose turn it is: the next chunk of prefill feeds, or all decode feeds
            that are due. None if nothing is due.
        """
        prefill: dict[Model | None, list[_Due]] = {}
        decode: dict[Model | None, list[_Due]] = {}
        for request in self._running:
            if request.finished or self.holds(request):
                continue
            task = self._task(request)
            if task is None:
                continue
            pending = [
                (task, index, feed)
                for index, feed in enumerate(task.step.feeds)
                if task.logits[index] is None
            ]
            several = [due for due in pending if len(due[2].tokens) > 1 or due[2].want != 1]
            # A task's decode feeds run last and all at once: their logits do not last.
            (prefill if several else decode).setdefault(task.model, []).extend(several or pending)
        model = self._take_turn([*dict.fromkeys([*prefill, *decode])])
        if model in prefill and not (model in decode and model in self._prefilled):
            self._prefilled.add(model)
            # Drafted tokens that are checked are a running row's, too.
            checks = sum(feed.past > 0 for due in prefill.values() for _, _, feed in due)
            size = self._limits.chunk_size(checks + sum(map(len, decode.values())))
            feeds = _next_chunk(prefill[model], size)
            return Batch(decode=False, feeds=feeds, model=model, chunk_size=size)
        self._prefilled.discard(model)
        return Batch(decode=True, feeds=decode[model], model=model) if decode else None

    def finish(self, request: Schedulable) -> None:
        """Take a request's slots back; a request that holds none is left alone."""
        self.advance(request)
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
            self._slots.release(request.slots)
            request.slots = []

    def advance(self, request: Schedulable) -> None:
        """Forget a request's completed step, so that its next one is asked for."""
        self._tasks.pop(id(request), None)
        self._held.discard(id(request))

    def hold(self, request: Schedulable) -> None:
        """Leave a request alone, whose completed step is looked at, until `advance`."""
        self._held.add(id(request))

    def holds(self, request: Schedulable) -> bool:
        """Whether a request's completed step is looked at."""
        return id(request) in self._held

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
                task = self._tasks[id(request)] = Task.of(request, step)
            except BaseException as error:  # noqa: BLE001 - a caller's code: even SystemExit is its own
                request.fail(error)
                return None
        return task


_Due = tuple[Task, int, Feed]


def _next_chunk(due: Sequence[_Due], size: int) -> list[_Due]:
    """What may run between two decode steps: prompts' next chunks as far as they fit, at least one.

    Feeds of rows that run already (the drafted tokens of a check) all run.
    """
    chosen, room, full = [], size, False
    for task, index, feed in due:
        if feed.past == 0:
            start = task.progress[index]
            cost = chunk_end(start, len(feed.tokens), feed.want, size) - start
            full = full or (room < size and cost > room)
            if full:
                continue
            room -= cost
        chosen.append((task, index, feed))
    return chosen
