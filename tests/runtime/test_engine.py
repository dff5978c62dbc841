"""The loop: whatever goes wrong reaches who caused it, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM, BackendError, CapacityError
from qwen_runtime.backends.base import Limits
from qwen_runtime.engine import Engine
from qwen_runtime.generation.base import Feed, RowCopy, Step

PROMPT = [5, 17, 99, 42, 7]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tiny_llm: LLM) -> Iterator[None]:
    yield
    assert tiny_llm._engine.num_requests == 0
    assert tiny_llm._engine.model.num_used_slots == 0


class CountingRunner:
    """Remembers every slot's tokens; logits point at the sum of what a slot holds."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.limits = Limits(vocab_size=16, max_context=1000)
        self.held: list[list[int]] = []
        self.capacity = 1
        self.calls = 0
        self.fail_at = fail_at

    @property
    def num_slots(self) -> int:
        return len(self.held)

    def allocate(self, slots: int, capacity: int) -> None:
        self.held += [[] for _ in range(slots - len(self.held))]

    def prefill(self, slots: Any, tokens: Any, past: Any, want: Any) -> list[np.ndarray]:
        self._count()
        assert len(set(slots)) == len(slots)
        rows = []
        for slot, new, length, count in zip(slots, tokens, past, want, strict=True):
            assert len(self.held[slot]) == length
            self.held[slot] += list(map(int, new))
            rows.append(np.stack([self._logits(slot)] * count) if count else np.empty((0, 16)))
        return rows

    def decode(self, slots: Any, tokens: Any) -> np.ndarray:
        self._count()
        for slot, token in zip(slots, tokens, strict=True):
            self.held[slot].append(int(token))
        return np.stack([self._logits(slot) for slot in slots])

    def copy(self, src: int, dst: int, length: int) -> None:
        self.held[dst] = self.held[src][:length]

    def truncate(self, slot: int, length: int) -> None:
        assert len(self.held[slot]) >= length
        del self.held[slot][length:]

    def grow(self, capacity: int) -> None: ...

    def close(self) -> None: ...

    def _logits(self, slot: int) -> np.ndarray:
        return np.eye(16, dtype=np.float32)[sum(self.held[slot]) % 16]

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise BackendError("the graph failed")


class Machine:
    """Rows that start from one prompt by copying and then go their own ways."""

    def __init__(self, rows: int, prompt: list[int], steps: int) -> None:
        self.num_rows = rows
        self.prompt, self.steps = prompt, steps
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finished = False

    def next_step(self) -> Step:
        past = len(self.prompt) + len(self.tokens[0]) - 1
        if past < len(self.prompt):
            return Step((Feed(0, np.array(self.prompt), past=0, want=1),))
        copies = [RowCopy(0, row, past) for row in range(1, self.num_rows)]
        return Step(
            tuple(
                Feed(row, np.array(tokens[-1:]), past=past, want=1)
                for row, tokens in enumerate(self.tokens)
            ),
            tuple(copies) if past == len(self.prompt) else (),
        )

    def accept(self, logits: Any) -> None:
        for row, tokens in enumerate(self.tokens):
            best = int(logits[row if len(logits) > 1 else 0][-1].argmax())
            tokens.append((best + row) % 16)
        self.finished = len(self.tokens[0]) == self.steps

    def cancel(self) -> None:
        self.finished = True


def expected(machine: Machine) -> list[list[int]]:
    """What the rows must generate, worked out without an engine."""
    first = sum(machine.prompt)
    rows = []
    for row in range(machine.num_rows):
        total, tokens = first, []
        for _ in range(machine.steps):
            tokens.append((total + row) % 16)
            total += tokens[-1]
        rows.append(tokens)
    return rows


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

    def zeros(shape: Any, dtype: Any = float) -> np.ndarray:
        if isinstance(shape, tuple) and len(shape) == 4 and shape[0] > slots:
            raise MemoryError
        return np.empty(shape, dtype) * 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_runtime.cache.np.zeros", zeros)
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


class BrokenError(Exception):
    """Raised by the callbacks below."""


def raising(after: int) -> Callable[..., Any]:
    calls = 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise BrokenError(f"call {calls}")
        return arguments[1] if len(arguments) > 1 and arguments[1] is not None else False

    return call


class RaisingStreamer:
    def __init__(self, at: str, after: int = 0) -> None:
        self.at, self.after = at, after

    def put(self, value: Any) -> None:
        if self.at == "put":
            if self.after == 0:
                raise BrokenError("put")
            self.after -= 1

    def end(self) -> None:
        if self.at == "end":
            raise BrokenError("end")


CALLBACKS: dict[str, Callable[[], dict[str, Any]]] = {
    "processor at once": lambda: {"logits_processor": [raising(0)]},
    "processor later": lambda: {"logits_processor": [raising(3)]},
    "criterion at once": lambda: {"stopping_criteria": [raising(0)]},
    "criterion later": lambda: {"stopping_criteria": [raising(3)]},
    "prefix function": lambda: {"prefix_allowed_tokens_fn": lambda *_: 1 / 0},
    "streamer on the prompt": lambda: {"streamer": RaisingStreamer("put")},
    "streamer later": lambda: {"streamer": RaisingStreamer("put", 3)},
    "streamer at the end": lambda: {"streamer": RaisingStreamer("end")},
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_that_raises_reaches_the_caller_and_harms_nothing(
    tiny_llm: LLM, name: str
) -> None:
    before = tiny_llm.generate(PROMPT, max_new_tokens=6)
    error = ZeroDivisionError if name == "prefix function" else BrokenError

    for arguments in ({}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(error, match=r"call|put|end|division"):
            tiny_llm.generate(PROMPT, max_new_tokens=6, **arguments, **CALLBACKS[name]())
        assert tiny_llm._engine.num_requests == 0
        assert tiny_llm._engine.model.num_used_slots == 0
    assert tiny_llm.generate(PROMPT, max_new_tokens=6) == before


def test_one_bad_callback_does_not_stop_the_requests_of_other_threads(tiny_llm: LLM) -> None:
    good = tiny_llm.generate([1, 2, 3], max_new_tokens=30)
    results: dict[int, Any] = {}
    barrier = threading.Barrier(6)

    def ask(index: int) -> None:
        barrier.wait()
        try:
            kwargs = list(CALLBACKS.values())[index]() if index % 2 else {}
            results[index] = tiny_llm.generate([1, 2, 3], max_new_tokens=30, **kwargs)
        except (BrokenError, ZeroDivisionError) as error:
            results[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert [results[index] for index in (0, 2, 4)] == [good] * 3
    assert all(isinstance(results[index], Exception) for index in (1, 3, 5))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, [1, 2], [3]]])
def test_interruption_passes_through_and_frees_everything(
    tiny_llm: LLM, interruption: type[BaseException], prompts: list[list[int]]
) -> None:
    before = tiny_llm.generate(prompts, max_new_tokens=6)
    calls = 0

    def interrupt(ids: Any, scores: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise interruption
        return scores

    with pytest.raises(interruption):
        tiny_llm.generate(prompts, max_new_tokens=6, logits_processor=[interrupt])

    assert tiny_llm._engine.num_requests == 0
    assert tiny_llm._engine.model.num_used_slots == 0
    assert tiny_llm.generate(prompts, max_new_tokens=6) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["processor", "streamer"])
def test_interruption_by_a_callback_reaches_its_own_request_only(
    interruption: type[BaseException], where: str
) -> None:
    class Interrupting(Machine):
        def next_step(self) -> Step:
            if where == "streamer" and len(self.tokens[0]) == 2:
                raise interruption
            return super().next_step()

        def accept(self, logits: Any) -> None:
            if where == "processor" and len(self.tokens[0]) == 2:
                raise interruption
            super().accept(logits)

    engine = Engine(CountingRunner())
    bad = engine.submit(Interrupting(1, [1, 2], 5))
    good = engine.submit(Machine(2, [3], 6))
    while engine.num_requests:
        engine.step()

    assert isinstance(bad.error, interruption)
    assert good.decoding.tokens == expected(good.decoding)
    assert engine.num_used_slots == 0


def test_step_interrupted_before_its_logits_are_handed_over_is_completed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(CountingRunner())
    request = engine.submit(Machine(2, [1, 2], 5))
    engine.step()
    deliver = engine._deliver_completed

    def interrupted() -> None:
        monkeypatch.setattr(engine, "_deliver_completed", deliver)
        if engine._scheduler.completed:
            raise KeyboardInterrupt
        monkeypatch.setattr(engine, "_deliver_completed", interrupted)

    monkeypatch.setattr(engine, "_deliver_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    for _ in range(20):
        engine.step()

    assert request.done.is_set()
    assert request.decoding.tokens == expected(request.decoding)


def test_interruption_while_requests_are_queued_leaves_none(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = tiny_llm._engine._engine._scheduler
    add, calls = scheduler.add, 0

    def interrupted(request: Any) -> None:
        nonlocal calls
        calls += 1
        add(request)
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "add", interrupted)

    with pytest.raises(KeyboardInterrupt):
        tiny_llm.generate([PROMPT, PROMPT, PROMPT], max_new_tokens=3)
    assert tiny_llm._engine.num_requests == 0


def test_interruption_of_one_thread_leaves_the_others_their_answers(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_output = tiny_llm.generate([1, 2, 3], max_new_tokens=40)
    runner = tiny_llm._engine.model._runner
    decode = runner.decode
    main, shared = threading.current_thread(), threading.Event()
    outputs: list[Any] = []

    def interrupted(slots: Any, tokens: Any) -> Any:
        logits = decode(slots, tokens)
        if len(slots) == 2 and threading.current_thread() is main:
            # Ctrl-C after the caches were written and before anyone got the logits.
            shared.set()
            raise KeyboardInterrupt
        time.sleep(0.002)
        return logits

    monkeypatch.setattr(runner, "decode", interrupted)
    other = threading.Thread(
        target=lambda: outputs.append(tiny_llm.generate([1, 2, 3], max_new_tokens=40))
    )
    other.start()

    def ask_until_interrupted() -> None:
        while other.is_alive():
            tiny_llm.generate(PROMPT, max_new_tokens=6)

    with pytest.raises(KeyboardInterrupt):
        ask_until_interrupted()
    other.join(timeout=60)

    assert shared.is_set()
    assert outputs == [expected_output]


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
