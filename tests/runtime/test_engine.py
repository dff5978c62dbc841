"""The loop: whatever goes wrong reaches who caused it, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from engine_doubles import CountingRunner, Machine, expected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM, BackendError, CapacityError
from qwen_runtime.engine import Engine, EngineLimits
from qwen_runtime.generation.base import Feed, Step

PROMPT = [5, 17, 99, 42, 7]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tiny_llm: LLM) -> Iterator[None]:
    yield
    assert tiny_llm._engine.num_requests == 0
    assert tiny_llm._engine.model.num_used_slots == 0


class FullRunner(CountingRunner):
    """Has room for four slots."""

    def allocate(self, slots: int, capacity: int) -> None:
        if slots > 4:
            raise CapacityError(f"{slots} slots")
        super().allocate(slots, capacity)


def test_request_that_is_too_large_fails_alone_and_later_ones_run() -> None:
    engine = Engine(FullRunner())
    small, large, other = (engine.submit(Machine(rows, [1, 2], 3)) for rows in (1, 50, 2))
    while engine.num_requests:
        engine.step()
    later = engine.submit(Machine(4, [3], 2))
    while engine.num_requests:
        engine.step()

    assert isinstance(large.error, CapacityError)
    assert engine.num_used_slots == 0
    for request in (small, other, later):
        assert request.error is None
        assert request.decoding.tokens == expected(request.decoding)


def test_model_goes_on_after_a_search_that_no_memory_is_enough_for(tiny_llm: LLM) -> None:
    before = tiny_llm.generate(PROMPT, max_new_tokens=3)

    for name in ("num_beams", "num_return_sequences"):
        with (
            memory_for(100),
            pytest.raises(CapacityError, match=r"1000 rows of 64 tokens need .* bytes") as error,
        ):
            tiny_llm.generate(PROMPT, max_new_tokens=3, do_sample=True, **{name: 1000})
        assert error.value.param == name
        assert tiny_llm.generate(PROMPT, max_new_tokens=3) == before


@contextmanager
def memory_for(slots: int) -> Iterator[None]:
    """As if no cache buffer of more slots could be had."""

    def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if shape[0] > slots:
            raise MemoryError
        return np.zeros(shape, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_runtime.cache._pages", zeros)
        yield


scripts = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.lists(st.integers(0, 15), min_size=1, max_size=5),
        st.integers(1, 6),
        st.integers(0, 8),  # the step before which it is submitted
        st.one_of(st.none(), st.integers(0, 12)),  # the step before which it is cancelled
    ),
    max_size=8,
)


@given(scripts)
def test_every_request_gets_its_tokens_and_gives_back_its_slots(
    script: list[tuple[int, list[int], int, int, int | None]],
) -> None:
    engine = Engine(CountingRunner())
    requests: dict[int, Any] = {}
    for step in range(200):
        for index, (rows, prompt, steps, start, stop) in enumerate(script):
            if start == step:
                requests[index] = engine.submit(Machine(rows, prompt, steps))
            if stop == step and index in requests:
                requests[index].cancel()
        live = sum(request.num_rows for request in requests.values() if not request.done.is_set())
        engine.step()
        assert engine.num_used_slots <= live
        if len(requests) == len(script) and engine.num_requests == 0:
            break

    assert (engine.num_requests, engine.num_used_slots) == (0, 0)
    for index, request in requests.items():
        rows = request.decoding.tokens
        whole = expected(request.decoding)
        assert request.done.is_set()
        assert request.error is None
        assert request.slots == []
        assert rows == [tokens[: len(rows[0])] for tokens in whole]
        if script[index][4] is None:
            assert rows == whole


@given(scripts, st.integers(1, 20))
@settings(max_examples=50)
def test_failing_call_fails_its_requests_and_no_others(
    script: list[tuple[int, list[int], int, int, int | None]], fail_at: int
) -> None:
    engine = Engine(CountingRunner(fail_at=fail_at))
    requests = [engine.submit(Machine(rows, prompt, steps)) for rows, prompt, steps, *_ in script]
    for _ in range(200):
        engine.step()

    assert (engine.num_requests, engine.num_used_slots) == (0, 0)
    for request in requests:
        assert request.done.is_set()
        if request.error is None:
            assert request.decoding.tokens == expected(request.decoding)
        else:
            assert isinstance(request.error, BackendError)
    later = engine.submit(Machine(2, [1, 2], 3))
    while engine.num_requests:
        engine.step()
    if engine.model._runner.calls > fail_at:
        assert later.decoding.tokens == expected(later.decoding)


def test_closing_while_another_thread_generates_is_an_error_there(
    tiny_llm: LLM,
) -> None:
    llm = LLM(tiny_llm.bundle, threads=1)
    started = threading.Event()
    errors: list[BaseException] = []

    def slow(ids: Any, scores: Any) -> Any:
        started.set()
        return scores

    def ask() -> None:
        try:
            for _ in range(10_000):
                llm.generate(PROMPT, max_new_tokens=50, logits_processor=[slow])
        except BackendError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    started.wait(timeout=60)
    llm.close()
    thread.join(timeout=60)

    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["the LLM is closed; open the bundle again"]
    assert llm._engine.num_requests == 0
    assert llm._engine.model.num_used_slots == 0


@given(
    order=st.permutations(range(5)),
    lengths=st.lists(st.integers(1, 12), min_size=5, max_size=5),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_streams_read_in_any_order_do_not_depend_on_it(
    text_llm: LLM, order: list[int], lengths: list[int]
) -> None:
    prompts = ["Hello", "a", "b c", "xyz", "1 2"]

    def chosen(index: int) -> dict[str, Any]:
        return {
            "max_new_tokens": lengths[index],
            "do_sample": bool(index % 2),
            "seed": index,
        }

    alone = [text_llm.generate(prompts[i], **chosen(i)).text for i in range(5)]
    streams = {i: text_llm.stream(prompts[i], **chosen(i)) for i in order}
    texts = dict.fromkeys(range(5), "")

    for _ in range(14):
        for index in order:
            texts[index] += next(streams[index], "")

    assert [texts[index] for index in range(5)] == alone


def test_prompt_at_its_first_chunk_is_not_what_outgrew_the_memory() -> None:
    class Narrow(CountingRunner):
        def allocate(self, slots: int, capacity: int) -> None:
            if slots * capacity > 200:
                raise CapacityError(f"{slots} slots of {capacity} tokens")
            super().allocate(slots, capacity)

        def grow(self, capacity: int) -> None:
            self.allocate(self.num_slots, capacity)

    class Checking(Machine):
        """Four tokens in every step."""

        def next_step(self) -> Step:
            return Step((Feed(0, np.ones(4, np.int64), past=4 * len(self.tokens[0]), want=1),))

    limits = EngineLimits(prefill_chunk_size=16, idle_chunk_size=16)
    engine = Engine(Narrow(), kept_slots=0, limits=limits)
    engine.submit(Machine(1, [1], 2))  # leaves slot 0 to the prompt
    tall = engine.submit(Checking(1, [], 60))
    while len(tall.decoding.tokens[0]) < 24:  # 96 tokens
        engine.step()
    prompt = engine.submit(Machine(1, [1] * 150, 3))
    while engine.num_requests:
        engine.step()

    assert isinstance(tall.error, CapacityError)
    assert prompt.error is None
    assert prompt.decoding.tokens == expected(prompt.decoding)


def test_row_that_outgrows_the_memory_fails_and_the_others_go_on() -> None:
    class Narrow(CountingRunner):
        def allocate(self, slots: int, capacity: int) -> None:
            if capacity > 20:
                raise CapacityError(f"{capacity} tokens")
            super().allocate(slots, capacity)

        def grow(self, capacity: int) -> None:
            self.allocate(self.num_slots, capacity)

    engine = Engine(Narrow(), kept_slots=0)
    long, *others = (engine.submit(Machine(1, [1] * length, 12)) for length in (15, 1, 3, 6))
    tall = engine.submit(Machine(1, [1] * 40, 3))
    while engine.num_requests:
        engine.step()

    assert isinstance(long.error, CapacityError)
    assert isinstance(tall.error, CapacityError)
    for request in others:
        assert request.error is None
        assert request.decoding.tokens == expected(request.decoding)
    assert engine.num_used_slots == 0
