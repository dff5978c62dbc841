"""Prompts that begin alike are computed once, and nothing stale is ever read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engine_doubles import Machine, RoundingRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import BackendError, CapacityError
from qwen_runtime import cache as cache_module
from qwen_runtime.engine import Engine, PrefixCache
from qwen_runtime.engine import prefix as prefix_module
from qwen_runtime.generation.base import Feed, Step

HEAD = [3, 1, 4, 1, 5, 9, 2, 6] * 5


@pytest.fixture(autouse=True, scope="module")
def small_buffers() -> Iterator[None]:
    """Buffers that grow and shrink with few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "GROWTH_STEP", 8)
        yield


def run(engine: Engine, *machines: Machine) -> list[list[list[int]]]:
    requests = [engine.submit(machine) for machine in machines]
    while engine.num_requests:
        engine.step()
    assert [request.error for request in requests] == [None] * len(requests)
    return [machine.tokens for machine in machines]


def alone(machine: Machine) -> list[list[int]]:
    """What a fresh engine without reuse generates."""
    fresh = Machine(machine.num_rows, machine.prompt, machine.steps)
    return run(Engine(RoundingRunner(), kept_slots=0), fresh)[0]


def test_second_prompt_computes_only_what_is_new() -> None:
    engine, runner = make()
    run(engine, Machine(1, [*HEAD, 7, 7], 4))
    before = runner.computed
    machine = Machine(1, [*HEAD, 8, 8, 8], 1)

    assert run(engine, machine) == [alone(machine)]
    assert machine.num_cached == len(HEAD)
    assert runner.computed - before == 3


def test_same_prompt_computes_two_tokens_as_one_alone_would_differ() -> None:
    engine, runner = make()
    run(engine, Machine(1, HEAD, 1))
    before = runner.computed
    machine = Machine(1, HEAD, 3)

    assert run(engine, machine) == [alone(machine)]
    assert machine.num_cached == len(HEAD) - 2
    assert runner.computed - before == 2 + 2


def test_generated_tokens_are_computed_again_in_the_next_turn() -> None:
    engine, _ = make()
    first = Machine(1, HEAD, 9)
    run(engine, first)
    second = Machine(1, [*HEAD, *first.tokens[0], 2, 2], 3)

    assert run(engine, second) == [alone(second)]
    assert second.num_cached == len(HEAD)

    third = Machine(1, [*second.prompt, *second.tokens[0], 5, 5], 3)
    assert run(engine, third) == [alone(third)]
    assert third.num_cached == len(second.prompt) - 1, "without the odd token at its end"


def test_engine_that_keeps_no_slots_computes_every_prompt_whole() -> None:
    runner = RoundingRunner()
    engine = Engine(runner, kept_slots=0)
    machines = [Machine(1, HEAD, 1) for _ in range(3)]

    run(engine, *machines)

    assert [machine.num_cached for machine in machines] == [0] * 3
    assert runner.computed == 3 * len(HEAD)
    assert not runner.cache.lengths.any()


def test_prompts_of_one_call_share_their_beginning() -> None:
    engine, runner = make()
    machines = [Machine(1, [*HEAD, index, index, index], 2) for index in range(6)]

    assert run(engine, *machines) == [alone(machine) for machine in machines]
    assert [machine.num_cached for machine in machines] == [0] + [len(HEAD)] * 5
    assert runner.computed == len(HEAD) + 6 * 3 + 6


def test_prompt_is_copied_from_a_request_that_runs() -> None:
    engine, _ = make()
    running = Machine(1, [*HEAD, 1, 2], 30)
    request = engine.submit(running)
    for _ in range(5):
        engine.step()
    later = Machine(2, [*HEAD, 3, 4, 5], 4)
    engine.submit(later)
    while engine.num_requests:
        engine.step()

    assert request.error is None
    assert later.num_cached == len(HEAD)
    assert [running.tokens, later.tokens] == [alone(running), alone(later)]


def test_what_a_cancelled_request_had_prefilled_is_used() -> None:
    engine, _ = make()
    request = engine.submit(Machine(1, HEAD, 30))
    for _ in range(5):
        engine.step()
    request.cancel()
    engine.step()
    machine = Machine(1, [*HEAD, 1, 2], 3)

    assert run(engine, machine) == [alone(machine)]
    assert machine.num_cached == len(HEAD)


def test_nothing_is_used_after_a_call_failed() -> None:
    engine, runner = make()
    run(engine, Machine(1, HEAD, 2))
    runner.fail_at = runner.calls + 1
    failed = engine.submit(Machine(1, [*HEAD, 1, 2], 2))
    engine.step()
    machine = Machine(1, [*HEAD, 1, 2], 3)

    assert isinstance(failed.error, BackendError)
    assert run(engine, machine) == [alone(machine)]
    assert machine.num_cached == 0


def test_kept_slots_are_the_few_used_last() -> None:
    engine, runner = make(kept_slots=3)
    prompts = [[number] * 20 for number in range(5)]
    for prompt in prompts:
        run(engine, Machine(1, prompt, 2))

    assert runner.num_slots == 3
    again = [Machine(1, [*prompt, 1, 2], 1) for prompt in prompts[::-1]]
    for machine in again:
        assert run(engine, machine) == [alone(machine)]
    assert [machine.num_cached for machine in again] == [20, 20, 0, 0, 0], (
        "one slot is for what runs"
    )


def test_conversation_keeps_one_slot_and_not_one_for_every_turn() -> None:
    engine, runner = make(kept_slots=8)
    prompt = HEAD
    for _ in range(6):
        machine = Machine(1, prompt, 4)
        run(engine, machine)
        prompt = [*prompt, *machine.tokens[0], 1]

    assert runner.num_slots <= 2
    assert np.count_nonzero(runner.cache.lengths) == 1


def test_rows_of_one_prompt_keep_one_slot() -> None:
    engine, runner = make()
    machine = Machine(9, HEAD, 4)

    assert run(engine, machine) == [alone(machine)]
    assert runner.cache.lengths.tolist() == [len(HEAD)] + [0] * 8
    assert run(engine, Machine(1, [*HEAD, 3, 3], 2))
    assert runner.num_slots <= 4, "the other rows are given back"


def test_long_kept_slot_is_dropped_once_it_has_cost_as_much_as_it_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_module, "KEPT_STEPS", 20)
    engine, runner = make()
    run(engine, Machine(1, HEAD * 10, 2))

    run(engine, Machine(1, [1, 2, 3], 15))
    assert runner.capacity >= 400
    resumed = Machine(1, [*HEAD * 10, 1, 2], 2)
    assert run(engine, resumed) == [alone(resumed)]
    assert resumed.num_cached == 400, "and its count starts again"

    run(engine, Machine(1, [1, 2, 3], 15))
    assert runner.capacity >= 400
    run(engine, Machine(1, [1, 2, 3], 15))
    assert runner.capacity <= 40


def test_kept_slots_give_way_when_memory_runs_out() -> None:
    engine, runner = make()
    for number in range(4):
        run(engine, Machine(1, [number] * 20, 2))
    assert runner.cache.lengths.all()
    reserve, asked = runner.cache.reserve, list[int]()

    def little(slots: int, capacity: int) -> bool:
        asked.append(int(np.count_nonzero(runner.cache.lengths)))
        if asked[-1] > 1:
            raise CapacityError("no memory")
        return reserve(slots, capacity)

    runner.cache.reserve = little  # type: ignore[method-assign]  # memory that runs out
    request = engine.submit(Machine(1, HEAD, 1))
    engine.step()

    assert request.error is None
    assert asked[:2] == [4, 1]


@pytest.mark.parametrize("grows", ["prompt", "steps"])
def test_kept_slots_give_way_when_a_row_needs_memory_to_grow(
    monkeypatch: pytest.MonkeyPatch, grows: str
) -> None:
    engine, runner = make()
    for number in range(4):
        run(engine, Machine(1, [number] * 20, 2))
    assert np.count_nonzero(runner.cache.lengths) == 4
    zeros, room = runner.cache._zeros, 4 * 24

    def little(slots: int, capacity: int) -> dict[str, Any]:
        if slots * capacity > room:
            raise CapacityError("no memory")
        return zeros(slots, capacity)

    monkeypatch.setattr(runner.cache, "_zeros", little)
    long = {"prompt": Machine(1, [5] * 88, 3), "steps": Machine(1, [5] * 20, 60)}[grows]

    assert run(engine, long) == [alone(long)]
    assert runner.num_slots < 4
    with pytest.raises(AssertionError, match="no memory"):
        run(engine, Machine(1, [5] * 100, 2))
    assert run(engine, long := Machine(1, HEAD, 5)) == [alone(long)], "and goes on working"


def test_borrowed_slot_evicts_the_prompt_unused_for_longest() -> None:
    engine, runner = make(kept_slots=3)
    for number in range(3):
        run(engine, Machine(1, [number] * 20, 2))
    again = Machine(1, [*[0] * 20, 7, 7], 1)
    run(engine, again)
    assert again.num_cached == 20

    slots = engine.model.borrow(1)
    engine.model.give_back(slots)

    assert runner.num_slots == 3
    assert engine.model._prefixes.tokens(slots[0]).tolist() == [1] * 20


def test_beginning_counts_as_far_as_all_of_it_was_prefilled() -> None:
    cache = PrefixCache(4)
    tokens = np.arange(60)

    cache.wrote(0, 0, tokens[:20])
    cache.wrote(0, 20, tokens[20:30])
    assert cache.tokens(0).tolist() == list(range(30))
    cache.wrote(1, 0, tokens[:19])
    assert cache.tokens(1).tolist() == list(range(18)), "the odd last token is computed alone"
    cache.truncate(0, 28)
    cache.wrote(0, 28, tokens[28:29])
    cache.wrote(0, 29, tokens[29:50])
    assert cache.tokens(0).tolist() == list(range(28))
    cache.copied(0, 1, 18)
    assert cache.find(tokens, 60, near=3) == (0, 28)
    assert cache.find(tokens, 19, near=1) == (1, 18)
    assert cache.find(tokens, 17, near=1) == (1, 16), "pairs are those of the whole prompt"
    assert cache.find(tokens[1:], 60, near=1) == (1, 0)
    assert cache.find(tokens, 15, near=2) == (2, 0), "too few to be worth it"


blocks = st.lists(st.sampled_from([[1] * 16, [2, 5] * 9, [3]]), min_size=1, max_size=5)
prompts = blocks.map(lambda parts: [token for part in parts for token in part])
scripts = st.lists(
    st.tuples(
        st.integers(1, 4),
        prompts,
        st.integers(1, 6),
        st.integers(0, 30),  # the step before which it is submitted
        st.one_of(st.none(), st.integers(0, 40)),  # the step before which it is cancelled
        st.booleans(),  # whether it goes on from an earlier request's tokens
    ),
    min_size=1,
    max_size=10,
)


@given(scripts, st.integers(0, 5), st.one_of(st.none(), st.integers(1, 25)), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_no_request_sees_what_others_left(
    script: list[tuple[int, list[int], int, int, int | None, bool]],
    kept_slots: int,
    fail_at: int | None,
    kept_steps: int,
) -> None:
    runner = RoundingRunner(fail_at=fail_at)
    engine = Engine(runner, kept_slots=kept_slots)
    requests: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_module, "KEPT_STEPS", kept_steps)
        for step in range(400):
            for index, (rows, prompt, steps, start, stop, follows) in enumerate(script):
                if start == step:
                    if follows and requests:
                        earlier = requests[min(requests)].decoding
                        prompt = [*earlier.prompt, *earlier.tokens[0], *prompt]
                    requests[index] = engine.submit(Machine(rows, prompt, steps))
                if stop == step and index in requests:
                    requests[index].cancel()
            engine.step()
            if len(requests) == len(script) and engine.num_requests == 0:
                break

    assert (engine.num_requests, engine.num_used_slots) == (0, 0)
    assert np.count_nonzero(runner.cache.lengths) <= kept_slots
    for request in requests.values():
        machine = request.decoding
        if request.error is None:
            assert machine.tokens == [row[: len(machine.tokens[0])] for row in alone(machine)]
        else:
            assert isinstance(request.error, BackendError)


@given(
    st.lists(prompts, min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=4), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_speculative_checks_leave_nothing_stale(
    prompts_of: list[list[int]], rounds: list[list[int]]
) -> None:
    engine = Engine(RoundingRunner())
    for prompt in prompts_of:
        checked, fresh = Checking(prompt, rounds), Checking(prompt, rounds)
        for one, on in ((checked, engine), (fresh, Engine(RoundingRunner(), kept_slots=0))):
            on.submit(one)
            while on.num_requests:
                on.step()
        assert checked.seen == fresh.seen


class Checking:
    """Runs candidates in blocks and takes back all but the first, as assisted decoding does."""

    num_rows = 1

    def __init__(self, prompt: list[int], rounds: list[list[int]]) -> None:
        self.tokens, self.rounds = prompt, rounds
        self.past = self.turn = 0
        self.seen: list[list[int]] = []

    @property
    def finished(self) -> bool:
        return self.turn > len(self.rounds)

    def next_step(self) -> Step:
        new = self.tokens if self.turn == 0 else self.rounds[self.turn - 1]
        return Step((Feed(0, np.array(new), past=self.past, want=1),))

    def accept(self, logits: Any) -> None:
        self.seen.append(logits[0].tolist())
        self.past += len(self.tokens) if self.turn == 0 else 1
        self.turn += 1

    def note_cached(self, row: int, num_tokens: int) -> None: ...

    def cancel(self) -> None: ...


def make(kept_slots: int = 4) -> tuple[Engine, RoundingRunner]:
    runner = RoundingRunner()
    return Engine(runner, kept_slots=kept_slots), runner
