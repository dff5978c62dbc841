"""The scheduler without a backend: every feed once, prefill first, nothing left behind."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.engine import Scheduler, SlotManager
from qwen_runtime.generation.base import Feed, Step


class Scripted:
    """A request that wants given numbers of tokens run, one list of rows per step."""

    def __init__(self, rows: int, steps: list[list[int]]) -> None:
        self.slots: list[int] = []
        self.num_rows = rows
        self.steps = steps
        self.done = 0
        self.asked = 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.steps)

    def next_step(self) -> Step:
        self.asked += 1
        sizes = self.steps[self.done]
        return Step(
            tuple(
                Feed(row, np.zeros(size, np.int64), past=0, want=1)
                for row, size in enumerate(sizes)
            )
        )


def drain(scheduler: Scheduler, limit: int = 1000) -> list[tuple[bool, int]]:
    """Run until nothing is due; kind and number of feeds of every batch."""
    batches = []
    for _ in range(limit):
        scheduler.admit()
        batch = scheduler.schedule()
        if batch is None:
            return batches
        batches.append((batch.decode, len(batch.feeds)))
        for task, index, _ in batch.feeds:
            task.logits[index] = np.zeros((1, 4), np.float32)
        for task in {id(task): task for task, _, _ in batch.feeds}.values():
            request = task.request
            if task.complete:
                assert isinstance(request, Scripted)
                request.done += 1
                scheduler.advance(request)
                if request.finished:
                    scheduler.finish(request)
    raise AssertionError("the scheduler never ran dry")


def test_prompts_run_before_single_tokens_and_together() -> None:
    slots = SlotManager()
    scheduler = Scheduler(slots)
    for steps in ([[5], [1], [1]], [[3], [1]]):
        scheduler.add(Scripted(1, steps))

    assert drain(scheduler) == [(False, 2), (True, 2), (True, 1)]
    assert slots.num_used == 0


def test_single_token_prompt_runs_as_a_decode_step() -> None:
    scheduler = Scheduler(SlotManager())
    scheduler.add(Scripted(1, [[1], [1]]))

    assert drain(scheduler) == [(True, 1), (True, 1)]


def test_step_of_prompts_and_single_tokens_is_asked_for_once() -> None:
    scheduler = Scheduler(SlotManager())
    request = Scripted(2, [[4, 1]])
    scheduler.add(request)

    assert drain(scheduler) == [(False, 1), (True, 1)]
    assert request.asked == 1


def test_request_that_arrives_later_is_prefilled_before_others_decode_on() -> None:
    scheduler = Scheduler(SlotManager())
    scheduler.add(Scripted(1, [[1]] * 3))
    scheduler.admit()
    assert scheduler.schedule() is not None

    scheduler.add(Scripted(1, [[7], [1]]))
    scheduler.admit()
    batch = scheduler.schedule()

    assert batch is not None
    assert not batch.decode
    assert [len(feed.tokens) for _, _, feed in batch.feeds] == [7]


def test_finishing_a_waiting_request_forgets_it() -> None:
    slots = SlotManager()
    scheduler = Scheduler(slots)
    request = Scripted(2, [[1]])
    scheduler.add(request)

    scheduler.finish(request)

    assert (scheduler.num_waiting, scheduler.num_running, slots.num_used) == (0, 0, 0)
    assert drain(scheduler) == []


@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=4),
        max_size=8,
    )
)
def test_every_feed_runs_exactly_once_and_all_slots_come_back(
    scripts: list[list[list[int]]],
) -> None:
    slots = SlotManager()
    scheduler = Scheduler(slots)
    for steps in scripts:
        scheduler.add(Scripted(max(len(step) for step in steps), steps))

    batches = drain(scheduler)

    feeds = sum(len(step) for steps in scripts for step in steps)
    assert sum(count for _, count in batches) == feeds
    assert (scheduler.num_waiting, scheduler.num_running, slots.num_used) == (0, 0, 0)
