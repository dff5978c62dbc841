"""Rows that move between steps: side by side in the end, with their contents, and nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_doubles import Machine, RoundingRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM, AsyncLLM, BackendError
from qwen_runtime import cache as cache_module
from qwen_runtime.engine import Engine, EngineLimits, Model, Request
from qwen_runtime.generation.base import Step

HEAD = [3, 1, 4, 1, 5, 9, 2, 6] * 5


@pytest.fixture(autouse=True, scope="module")
def small_buffers() -> Iterator[None]:
    """Buffers that grow and shrink with few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "GROWTH_STEP", 8)
        yield


class WatchedRunner(RoundingRunner):
    """Remembers which slots its decode calls ran, and which copies were made."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        super().__init__(fail_at=fail_at)
        self.decoded: list[list[int]] = []
        self.copied: list[tuple[int, int]] = []
        self.interrupt_copy = -1
        self.copy_error: type[BaseException] = KeyboardInterrupt

    def decode(self, slots: Any, tokens: Any) -> np.ndarray:
        self.decoded.append(sorted(slots))
        return super().decode(slots, tokens)

    def copy(self, src: int, dst: int, length: int) -> None:
        super().copy(src, dst, length)
        self.copied.append((src, dst))
        if len(self.copied) - 1 == self.interrupt_copy:
            raise self.copy_error


def make(kept_slots: int = 0) -> tuple[Engine, WatchedRunner]:
    runner = WatchedRunner()
    return Engine(runner, kept_slots=kept_slots), runner


def drain(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.num_requests:
            return
        engine.step()
    raise AssertionError("the engine never ran dry")


def alone(machine: Machine) -> list[list[int]]:
    """What an engine of its own generates, row by row as far as ``machine`` came."""
    engine = Engine(RoundingRunner(), kept_slots=0)
    fresh = Machine(machine.num_rows, machine.prompt, machine.steps)
    engine.submit(fresh)
    drain(engine)
    return [row[: len(machine.tokens[0])] for row in fresh.tokens]


def side_by_side(slots: list[int]) -> bool:
    return slots == list(range(slots[0], slots[0] + len(slots)))


def staggered(steps: list[int], rows: int = 1) -> list[Machine]:
    return [Machine(rows, [index, 2, 3], count) for index, count in enumerate(steps)]


def test_rows_that_stay_run_side_by_side_and_generate_what_they_would_alone() -> None:
    engine, runner = make()
    machines = staggered([30, 4, 25, 8, 2, 17, 9, 28])
    requests = [engine.submit(machine) for machine in machines]
    drain(engine)

    assert [request.error for request in requests] == [None] * 8
    assert [machine.tokens for machine in machines] == [alone(machine) for machine in machines]
    assert len(runner.decoded[0]) == 8
    assert all(map(side_by_side, runner.decoded))
    assert 1 <= len(runner.copied) <= 7, "no row moves more often than rows end"
    assert engine.num_used_slots == 0


def test_rows_that_end_at_the_edge_move_nobody() -> None:
    engine, runner = make()
    for machine in staggered([20, 16, 12, 8, 4]):
        engine.submit(machine)
    drain(engine)

    assert runner.copied == []


def test_place_of_a_row_that_ended_goes_to_the_request_that_waits() -> None:
    runner = WatchedRunner()
    engine = Engine(runner, kept_slots=0, limits=EngineLimits(max_num_seqs=4))
    machines = staggered([6, 3, 9, 20, 20, 20, 20, 20])
    for machine in machines:
        engine.submit(machine)
    while engine.stats().num_waiting:
        engine.step()

    assert runner.copied == []
    drain(engine)
    assert [machine.tokens for machine in machines] == [alone(machine) for machine in machines]


def test_rows_of_one_request_move_each_by_itself() -> None:
    engine, runner = make()
    machines = [Machine(3, [1, 2, 3], 4), Machine(2, [4], 30), Machine(4, [9, 9], 5)]
    machines += [Machine(3, [7, 7], 25)]
    requests = [engine.submit(machine) for machine in machines]
    for _ in range(14):
        engine.step()

    held = [slot for request in requests for slot in request.slots]
    assert side_by_side(sorted(held))
    assert engine.model._slots.used == sorted(held)
    assert 1 <= len(runner.copied) - (2 + 1 + 3 + 2) <= 5, "and rows start as copies of the first"
    drain(engine)
    assert [machine.tokens for machine in machines] == [alone(machine) for machine in machines]


def test_row_of_a_request_whose_others_ended_leaves_them_behind() -> None:
    class Ending(Machine):
        """Only its first and its last row go on after the third token."""

        def next_step(self) -> Step:
            step = super().next_step()
            if len(self.tokens[0]) <= 3:
                return step
            return Step((step.feeds[0], step.feeds[-1]))

        def accept(self, logits: Any) -> None:
            if len(self.tokens[0]) > 3:
                filler = [np.eye(1, 16, dtype=np.float32)] * (self.num_rows - 2)
                logits = [logits[0], *filler, logits[1]]
            super().accept(logits)

    engine, runner = make()
    machine = Ending(6, HEAD, 20)
    engine.submit(machine)
    engine.submit(Machine(3, [1], 2))
    drain(engine)

    assert runner.decoded[-1] == [5, 6]
    whole = alone(machine)
    assert [machine.tokens[0], machine.tokens[-1]] == [whole[0], whole[-1]]


def test_kept_prompts_are_not_written_over() -> None:
    engine, runner = make(kept_slots=4)
    kept = [number * 2 for number in range(20)]
    machines = [Machine(1, [1, 2, 3], 60), Machine(1, kept, 2), *staggered([60, 9, 60, 7, 60])]
    for machine in machines:
        engine.submit(machine)
    for _ in range(30):
        engine.step()

    assert 1 in np.flatnonzero(runner.cache.lengths)
    assert runner.copied, "rows moved"
    assert side_by_side(runner.decoded[-1])
    assert 1 not in runner.decoded[-1], "they lie beside the prompt that is kept"
    again = Machine(1, [*kept, 5, 5], 2)
    engine.submit(again)
    drain(engine)
    assert again.num_cached == 20
    machines.append(again)
    assert [machine.tokens for machine in machines] == [alone(machine) for machine in machines]


def test_prompt_of_a_row_that_moves_out_of_a_keeping_slot_stays_there() -> None:
    engine, runner = make(kept_slots=2)
    long = Machine(1, HEAD, 40)
    others = [Machine(1, [*HEAD[1:], 8], 2), *staggered([40, 40, 5])]
    for machine in [long, *others]:
        engine.submit(machine)
    while len(long.tokens[0]) < 30:
        engine.step()
    assert runner.decoded[-1] == [2, 3, 4], "out of 0: 1 keeps a prompt"
    assert engine.model._prefixes.tokens(0).tolist() == HEAD
    drain(engine)

    again = Machine(1, [*HEAD, 5, 5], 2)
    engine.submit(again)
    drain(engine)
    assert again.num_cached == len(HEAD)
    assert [long.tokens, again.tokens] == [alone(long), alone(again)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendError])
def test_move_that_does_not_end_leaves_the_row_where_it_was(error: type[BaseException]) -> None:
    engine, runner = make(kept_slots=2)
    machines = staggered([30, 4, 25, 8, 2, 17, 9, 28])
    requests = [engine.submit(machine) for machine in machines]
    runner.interrupt_copy, runner.copy_error = 1, error
    interrupted = 0
    while engine.num_requests:
        before = {id(request): list(request.slots) for request in requests}
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupted += 1
            moved = [r for r in requests if r.slots and r.slots != before[id(r)]]
            assert not moved
        assert engine.num_used_slots == sum(len(request.slots) for request in requests)

    assert interrupted == (error is KeyboardInterrupt)
    failed = [request for request in requests if request.error is not None]
    assert bool(failed) == (error is BackendError)
    for machine in machines:
        assert machine.tokens == alone(machine)
    assert engine.num_used_slots == 0


def test_held_request_stays_while_its_callback_has_others_run() -> None:
    engine, runner = make()
    seen: list[tuple[list[int], list[int]]] = []
    nested = False

    def callback() -> None:
        nonlocal nested
        if nested or holding.finished:
            return
        nested = True
        for _ in range(2):
            before = list(held.slots)
            engine.step()
            seen.append((before, list(held.slots)))
        nested = False

    machines = staggered([12, 4, 25, 8, 2, 17, 9])
    holding = Machine(1, [1, 1], 30)
    others = [engine.submit(machine) for machine in machines]
    held = engine.submit(holding, callback)
    drain(engine)

    assert [request.error for request in others] == [None] * 7
    assert seen
    assert all(before == after for before, after in seen)
    assert runner.copied
    for machine in [*machines, holding]:
        assert machine.tokens == alone(machine)


class Drafting(Machine):
    """Runs every step on its draft model too, and looks at what that says."""

    def __init__(self, prompt: list[int], steps: int) -> None:
        super().__init__(1, prompt, steps)
        self.drafted: list[int] = []
        self.on_draft = True

    def next_step(self) -> Step:
        step = super().next_step()
        return Step(step.feeds, step.copies, on_draft=self.on_draft)

    def accept(self, logits: Any) -> None:
        if self.on_draft:
            self.drafted.append(int(logits[0][-1].argmax()))
        else:
            super().accept(logits)
        self.on_draft = not self.on_draft


def test_rows_of_a_draft_model_move_there_by_themselves() -> None:
    def run(machines: list[Drafting]) -> WatchedRunner:
        engine, _ = make()
        draft_runner = WatchedRunner()
        draft = Model(draft_runner, kept_slots=0)
        # Somebody else's row lies between.
        draft.borrow(1)
        for machine in machines[:2]:
            engine.submit(machine, draft=draft)
            engine.step()
        borrowed = draft.borrow(1)
        for machine in machines[2:]:
            engine.submit(machine, draft=draft)
        drain(engine)
        assert draft.num_used_slots == 2
        assert borrowed == [3] if len(machines) > 1 else True
        return draft_runner

    machines = [
        Drafting([n, 4], steps) for n, steps in enumerate([25, 5, 6, 22, 9, 24, 3, 20, 23, 21])
    ]
    draft_runner = run(machines)

    assert draft_runner.copied
    assert all(target != 3 != source for source, target in draft_runner.copied)
    assert any(len(slots) == 5 and side_by_side(slots) for slots in draft_runner.decoded)
    for machine in machines:
        fresh = Drafting(machine.prompt, machine.steps)
        run([fresh])
        assert (machine.tokens, machine.drafted) == (fresh.tokens, fresh.drafted)


def test_buffers_grow_with_a_long_prompt_and_shrink_only_after_it() -> None:
    runner = WatchedRunner()
    engine = Engine(runner, kept_slots=0, limits=EngineLimits(prefill_chunk_size=16))
    short = engine.submit(Machine(1, [1], 900))
    engine.step()
    long = engine.submit(Machine(1, [2] * 300, 2))
    sizes = [runner.capacity]
    while not long.done.is_set():
        engine.step()
        sizes.append(runner.capacity)
    assert sizes == sorted(sizes)
    assert max(sizes) >= 300
    assert len(set(sizes)) < 300 / 16, "several chunks at a time"
    for _ in range(4):
        engine.step()
    assert runner.capacity < 100, "one short row is left"
    short.cancel()
    drain(engine)


def test_buffers_of_a_long_prompt_go_with_the_next_one_where_nothing_decodes() -> None:
    engine, runner = make()
    for length, capacity in ((300, 304), (200, 304), (20, 24)):
        engine.submit(Machine(1, [2] * length, 1))
        drain(engine)
        assert runner.capacity == capacity


def test_buffers_stay_when_load_falls_and_rises_again() -> None:
    engine, runner = make()
    sizes = set()
    keep = [engine.submit(Machine(1, [n], 400)) for n in range(6)]
    for number in range(10):
        engine.submit(Machine(1, [number], 5))
    for _ in range(10):
        engine.step()
    assert engine.model._slots.num_slots == 6
    for number in range(10):
        engine.submit(Machine(1, [number], 40))
        engine.step()
        sizes.add(runner.num_slots)
    assert sizes == {16}

    while engine.num_requests > 6:
        engine.step()
    for number in range(12):
        engine.submit(Machine(1, [number], 2))
        while engine.num_requests > 6:
            engine.step()
    assert runner.num_slots <= 8, "and shrink once load has been low for a while"
    for request in keep:
        request.cancel()
    drain(engine)
    for machine in staggered([5] * 9):
        engine.submit(machine)
    drain(engine)
    engine.submit(Machine(1, [1], 2))
    drain(engine)
    assert runner.num_slots == 1, "and at once where nothing ran"


blocks = st.lists(st.sampled_from([[1] * 16, [2, 5] * 9, [3]]), min_size=1, max_size=4)
prompts = blocks.map(lambda parts: [token for part in parts for token in part])
scripts = st.lists(
    st.tuples(
        st.integers(1, 4),
        prompts,
        st.integers(1, 40),
        st.integers(0, 20),  # the step before which it is submitted
        st.one_of(st.none(), st.integers(0, 40)),  # the step before which it is cancelled
    ),
    min_size=3,
    max_size=10,
)


class InterruptedRunner(WatchedRunner):
    """Is interrupted in some of its calls, before or after their work."""

    def __init__(self, interruptions: set[int]) -> None:
        super().__init__()
        self.interruptions, self.asked = interruptions, 0

    def prefill(self, *arguments: Any) -> list[np.ndarray]:
        self._interrupt()
        result = super().prefill(*arguments)
        self._interrupt()
        return result

    def decode(self, *arguments: Any) -> np.ndarray:
        self._interrupt()
        result = super().decode(*arguments)
        self._interrupt()
        return result

    def copy(self, src: int, dst: int, length: int) -> None:
        self._interrupt()
        super().copy(src, dst, length)
        self._interrupt()

    def _interrupt(self) -> None:
        self.asked += 1
        if self.asked in self.interruptions:
            raise KeyboardInterrupt


@given(scripts, st.integers(0, 5), st.sets(st.integers(1, 200), max_size=6))
@settings(max_examples=100, deadline=None)
def test_contents_follow_rows_whatever_comes_and_goes_and_is_interrupted(
    script: list[tuple[int, list[int], int, int, int | None]],
    kept_slots: int,
    interruptions: set[int],
) -> None:
    runner = InterruptedRunner(interruptions)
    engine = Engine(runner, kept_slots=kept_slots)
    requests: dict[int, Request] = {}
    for step in range(600):
        for index, (rows, prompt, steps, start, stop) in enumerate(script):
            if start == step:
                requests[index] = engine.submit(Machine(rows, prompt, steps))
            if stop == step and index in requests:
                requests[index].cancel()
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
        finally:
            held = [slot for request in requests.values() for slot in request.slots]
            assert engine.model._slots.used == sorted(held)
            assert len(held) == len(set(held))
        if len(requests) == len(script) and engine.num_requests == 0:
            break

    assert (engine.num_requests, engine.num_used_slots) == (0, 0)
    assert np.count_nonzero(runner.cache.lengths) <= kept_slots
    for request in requests.values():
        assert request.error is None
        assert isinstance(request.decoding, Machine)
        assert request.decoding.tokens == alone(request.decoding)


def test_real_model_gives_the_same_bits_whether_rows_move_or_not(
    embedded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    limits = [40, 6, 33, 12, 4, 25, 9, 38, 30]
    with LLM(embedded_bundle, threads=1, prefix_cache_slots=2) as llm:
        vocab_size = llm.bundle.manifest.model.vocab_size
        asked = [rng.integers(0, vocab_size, length).tolist() for length in rng.integers(3, 40, 9)]
        chosen: list[dict[str, Any]] = [
            {"max_new_tokens": limit, "eos_token_id": None, "logprobs": True, "top_logprobs": 5}
            | {"do_sample": bool(seed % 2), "seed": seed}
            for seed, limit in enumerate(limits)
        ]
        with LLM(embedded_bundle, threads=1, prefix_cache_slots=0) as plain:
            alone = [
                plain.generate(prompt, **settings)
                for prompt, settings in zip(asked, chosen, strict=True)
            ]

        runner = llm._engine.model._runner
        copy, copied = runner.copy, list[tuple[int, int]]()

        def watched(src: int, dst: int, length: int) -> None:
            copied.append((src, dst))
            copy(src, dst, length)

        monkeypatch.setattr(runner, "copy", watched)

        async def together() -> list[Any]:
            service = AsyncLLM(llm)
            calls = [
                service.generate(prompt, **settings)
                for prompt, settings in zip(asked, chosen, strict=True)
            ]
            return list(await asyncio.gather(*calls))

        assert asyncio.run(together()) == alone
        assert copied
