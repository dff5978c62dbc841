"""The scheduler without a backend: every token once, in order, within limits, and fairly."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import RequestError
from qwen_runtime.engine import EngineLimits, Scheduler, SlotManager
from qwen_runtime.engine.chunks import chunk_end
from qwen_runtime.generation.base import Feed, Step


class Scripted:
    """A request that wants given numbers of tokens run, one list of rows per step."""

    draft = None

    def __init__(self, rows: int, steps: list[list[int]], num_tokens: int = 1) -> None:
        self.slots: list[int] = []
        self.num_rows = rows
        self.num_tokens = num_tokens
        self.steps = steps
        self.done = 0
        self.asked = 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.steps)

    def next_step(self) -> Step:
        self.asked += 1
        past = sum(max(step) for step in self.steps[: self.done])
        return Step(
            tuple(
                Feed(row, np.zeros(size, np.int64), past=past, want=1)
                for row, size in enumerate(self.steps[self.done])
            )
        )

    def fail(self, error: BaseException) -> None:
        raise error


@dataclass
class Ran:
    """One batch."""

    decode: bool
    requests: list[Scripted]
    tokens: int
    """Tokens of prompts in it."""
    decode_due: bool
    """Whether some row could have decoded."""


@dataclass
class Simulation:
    """Runs batches as an engine does."""

    scheduler: Scheduler
    admitted: list[Scripted] = field(default_factory=list)
    batches: list[Ran] = field(default_factory=list)

    def step(self) -> bool:
        scheduler = self.scheduler
        self.admitted += scheduler.admit()
        batch = scheduler.schedule()
        if batch is None:
            return False
        tokens = 0
        due = any(
            all(
                len(feed.tokens) == 1
                for feed, logits in zip(task.step.feeds, task.logits, strict=True)
                if logits is None
            )
            for task in scheduler._tasks.values()
        )
        for task, index, feed in batch.feeds:
            start, length = task.progress[index], len(feed.tokens)
            assert task.logits[index] is None
            end = 1 if batch.decode else chunk_end(start, length, feed.want, batch.chunk_size)
            assert start < end <= length
            task.progress[index] = end
            tokens += 0 if batch.decode or feed.past else end - start
            if end == length:
                task.logits[index] = np.zeros((1, 4), np.float32)
        requests = [task.request for task in batch.tasks]
        self.batches.append(Ran(batch.decode, requests, tokens, due))
        for task in batch.tasks:
            if task.complete:
                task.request.done += 1
                scheduler.advance(task.request)
                if task.request.finished:
                    scheduler.finish(task.request)
        return True

    def drain(self, limit: int = 2000) -> list[tuple[bool, int]]:
        """Run until nothing is due; kind and number of requests of every batch."""
        for _ in range(limit):
            if not self.step():
                return [(ran.decode, len(ran.requests)) for ran in self.batches]
        raise AssertionError("the scheduler never ran dry")


def simulation(*requests: Scripted, **limits: int) -> Simulation:
    scheduler = Scheduler(SlotManager(), EngineLimits(**limits))
    for request in requests:
        scheduler.add(request)
    return Simulation(scheduler)


def test_prompts_run_before_single_tokens_and_together() -> None:
    slots = SlotManager()
    scheduler = Scheduler(slots)
    for steps in ([[5], [1], [1]], [[3], [1]]):
        scheduler.add(Scripted(1, steps))

    assert Simulation(scheduler).drain() == [(False, 2), (True, 2), (True, 1)]
    assert slots.num_used == 0


def test_single_token_prompt_runs_as_a_decode_step() -> None:
    assert simulation(Scripted(1, [[1], [1]])).drain() == [(True, 1), (True, 1)]


def test_step_of_prompts_and_single_tokens_is_asked_for_once() -> None:
    request = Scripted(2, [[4, 1]])

    assert simulation(request).drain() == [(False, 1), (True, 1)]
    assert request.asked == 1


def test_single_tokens_of_a_step_wait_for_all_chunks_of_its_prompts() -> None:
    # Logits of a decode batch are gone with the next call; they must come last.
    mixed = Scripted(2, [[70, 1]])
    running = Scripted(1, [[1]] * 12)
    run = simulation(running, mixed, prefill_chunk_size=16)
    run.drain()

    kinds = [ran.decode for ran in run.batches if mixed in ran.requests]
    assert kinds == [False] * 5 + [True]


def test_request_that_arrives_later_is_prefilled_before_others_decode_on() -> None:
    run = simulation(Scripted(1, [[1]] * 3))
    run.step()
    run.scheduler.add(Scripted(1, [[7], [1]]))
    run.step()

    assert [(ran.decode, ran.tokens) for ran in run.batches] == [(True, 0), (False, 7)]


def test_prompts_and_running_rows_take_turns_chunk_by_chunk() -> None:
    run = simulation(Scripted(1, [[1]] * 20), prefill_chunk_size=32)
    run.step()
    run.scheduler.add(Scripted(1, [[100], [1]]))
    for _ in range(7):
        run.step()

    assert [ran.decode for ran in run.batches] == [True, *[False, True] * 3, False]
    assert [ran.tokens for ran in run.batches if not ran.decode] == [32, 32, 32, 4]


def test_prompts_run_in_large_chunks_while_nothing_decodes() -> None:
    run = simulation(Scripted(1, [[1300], [1]]), prefill_chunk_size=32, idle_chunk_size=512)
    run.drain()

    assert [ran.tokens for ran in run.batches] == [512, 512, 276, 0]


def test_short_prompts_share_a_chunk_and_run_in_their_order() -> None:
    prompts = [Scripted(1, [[10]]) for _ in range(5)]
    run = simulation(Scripted(1, [[1]] * 9), prefill_chunk_size=32)
    run.step()
    for prompt in prompts:
        run.scheduler.add(prompt)
    run.drain()

    assert [r.requests for r in run.batches if not r.decode] == [prompts[:3], prompts[3:]]


def test_drafted_tokens_of_running_rows_do_not_keep_a_prompt_waiting() -> None:
    checking = [Scripted(1, [[2], *[[6]] * 40]) for _ in range(8)]
    run = simulation(*checking, prefill_chunk_size=16)
    run.step()
    late = Scripted(1, [[40]])
    run.scheduler.add(late)
    for _ in range(3):
        run.step()

    assert late.finished


def test_rows_beyond_the_limit_wait_in_the_order_they_came_in() -> None:
    requests = [Scripted(rows, [[1] * rows]) for rows in (2, 3, 1, 4, 1)]
    run = simulation(*requests, max_num_seqs=4)
    run.step()
    assert run.admitted == requests[:1]
    assert run.scheduler.num_waiting == 4

    run.drain()
    assert run.admitted == requests


def test_request_of_more_rows_than_the_limit_runs_by_itself() -> None:
    before, large, after = (Scripted(rows, [[1] * rows] * 2) for rows in (1, 9, 1))
    run = simulation(before, large, after, max_num_seqs=4)
    run.drain()

    assert [ran.requests for ran in run.batches] == [[before]] * 2 + [[large]] * 2 + [[after]] * 2


def test_rows_are_counted_as_long_as_the_longest_against_the_cache() -> None:
    requests = [Scripted(1, [[1]] * 2, num_tokens=tokens) for tokens in (10, 10, 40, 10)]
    run = simulation(*requests, max_cache_tokens=60)
    run.step()

    # Two rows of 10 fit; a third of 40 would make it 3 x 40.
    assert run.admitted == requests[:2]
    run.drain()
    assert run.admitted == requests


def test_finishing_a_waiting_request_forgets_it() -> None:
    slots = SlotManager()
    scheduler = Scheduler(slots)
    request = Scripted(2, [[1]])
    scheduler.add(request)

    scheduler.finish(request)

    assert (scheduler.num_waiting, scheduler.num_running, slots.num_used) == (0, 0, 0)
    assert Simulation(scheduler).drain() == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_num_seqs", 0, r"max_num_seqs must be an integer >= 1, got 0"),
        ("max_num_seqs", True, r"max_num_seqs must be an integer >= 1, got True"),
        ("max_queued_requests", -1, r"max_queued_requests must be an integer >= 0, got -1"),
        ("max_cache_tokens", 1.5, r"max_cache_tokens must be an integer >= 1, got 1.5"),
        ("prefill_chunk_size", 8, r"prefill_chunk_size must be an integer >= 16, got 8"),
        ("prefill_chunk_size", 33, r"prefill_chunk_size must be even, .* got 33"),
        ("idle_chunk_size", float("nan"), r"idle_chunk_size must be an integer >= 16, got nan"),
    ],
)
def test_limits_that_are_none_are_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        EngineLimits(**{name: value})
    assert error.value.param == name


@given(
    length=st.integers(1, 300),
    want=st.integers(0, 12),
    size=st.integers(8, 40).map(lambda half: 2 * half),
    reused=st.integers(0, 140).map(lambda half: 2 * half),
)
def test_cuts_are_even_lie_on_a_grid_and_leave_no_token_alone(
    length: int, want: int, size: int, reused: int
) -> None:
    want = min(want, length)
    start = min(reused, max(0, length - max(want, 2)) // 2 * 2)
    cuts = [start]
    while cuts[-1] < length:
        cuts.append(chunk_end(cuts[-1], length, want, size))

    assert cuts == sorted(set(cuts))
    sizes = np.diff(cuts)
    assert all(cut % 2 == 0 for cut in cuts[:-1])
    assert all(sizes >= 2) or length - start < 2
    assert all(sizes <= size + max(want, 2))
    assert length - cuts[-2] >= want
    # All but the last cut, which wanted positions may move, are where they always are.
    assert all(cut % size == 0 for cut in cuts[1:-2])


steps = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3), min_size=1, max_size=4)
scripts = st.lists(
    st.tuples(
        steps,
        st.integers(1, 500),  # tokens its rows may hold
        st.integers(0, 12),  # the step before which it comes
        st.one_of(st.none(), st.integers(0, 30)),  # the step before which it is finished early
    ),
    max_size=8,
)
limits = st.builds(
    EngineLimits,
    max_num_seqs=st.integers(1, 6),
    prefill_chunk_size=st.sampled_from([16, 18, 32]),
    idle_chunk_size=st.sampled_from([16, 64]),
    max_cache_tokens=st.one_of(st.none(), st.integers(500, 2000)),
)


@given(scripts, limits)
@settings(deadline=None)
def test_whatever_arrives_all_of_it_runs_within_limits_and_slots_come_back(
    script: list[tuple[list[list[int]], int, int, int | None]], limits: EngineLimits
) -> None:
    slots = SlotManager()
    run = Simulation(Scheduler(slots, limits))
    requests: dict[int, Scripted] = {}
    came: list[Scripted] = []
    ended_early: set[int] = set()
    for now in range(2000):
        for index, (steps, tokens, start, stop) in enumerate(script):
            if start == now:
                rows = max(len(step) for step in steps)
                requests[index] = Scripted(rows, steps, tokens)
                came.append(requests[index])
                run.scheduler.add(requests[index])
            if stop == now and index in requests and not requests[index].finished:
                ended_early.add(id(requests[index]))
                run.scheduler.finish(requests[index])
        ran = run.step()
        holding = [r for r in requests.values() if r.slots]
        assert slots.num_used == sum(r.num_rows for r in holding)
        if len(holding) > 1:
            longest = max(r.num_tokens for r in holding)
            assert limits.fits(slots.num_used, longest)
        if not ran and len(requests) == len(script):
            break

    assert (run.scheduler.num_waiting, run.scheduler.num_running, slots.num_used) == (0, 0, 0)
    # Nobody is passed by, and everything that was not ended early ran to its end.
    assert run.admitted == [r for r in came if r in run.admitted]
    for request in came:
        assert request.finished != (id(request) in ended_early)
    for before, ran in pairwise(run.batches):
        # A row that could decode waits for one chunk at most.
        assert not (before.decode_due and ran.decode_due) or before.decode or ran.decode
    for ran in run.batches:
        assert not ran.decode_due or ran.tokens <= limits.prefill_chunk_size + 2


@pytest.mark.parametrize(
    ("rows", "tokens"), [(0, 512), (1, 32), (16, 32), (23, 32), (24, 64), (32, 64), (40, 96)]
)
def test_more_decoding_rows_take_larger_chunks_on_the_same_grid(rows: int, tokens: int) -> None:
    assert EngineLimits(prefill_chunk_size=32, idle_chunk_size=512).chunk_size(rows) == tokens
    # Where cuts may not depend on load, they do not.
    assert EngineLimits(prefill_chunk_size=64, idle_chunk_size=64).chunk_size(rows) == 64


def test_prompts_leave_room_for_rows_whose_drafted_tokens_are_checked() -> None:
    run = simulation(Scripted(1, [[2], *[[6]] * 40]), prefill_chunk_size=16)
    run.step()
    run.scheduler.add(Scripted(1, [[200]]))
    for _ in range(5):
        run.step()

    assert [ran.tokens for ran in run.batches[1:]] == [16] * 5


def test_request_is_admitted_beyond_the_limits_while_all_others_wait_for_it() -> None:
    outer, inner, later = (Scripted(1, [[1]] * 2) for _ in range(3))
    run = simulation(outer, max_num_seqs=1)
    run.step()
    run.scheduler.hold(outer)
    for request in (inner, later):
        run.scheduler.add(request)

    assert run.scheduler.admit() == [inner]
    assert run.scheduler.num_waiting == 1


def test_request_that_is_queued_twice_runs_once() -> None:
    request = Scripted(1, [[1]])
    run = simulation(request, request)
    run.drain()

    assert run.admitted == [request]
