"""What callbacks raise, and interruptions: who hears of it, and what stays sound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_doubles import CountingRunner, Machine, expected

from qwen_runtime import LLM
from qwen_runtime.engine import Engine
from qwen_runtime.generation.base import Step

PROMPT = [5, 17, 99, 42, 7]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tiny_llm: LLM) -> Iterator[None]:
    yield
    assert tiny_llm._engine.num_requests == 0
    assert tiny_llm._engine.model.num_used_slots == 0


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


def test_prompt_interrupted_after_its_call_is_run_again_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Strict(CountingRunner):
        def prefill(self, slots: Any, tokens: Any, past: Any, want: Any) -> Any:
            assert all(len(new) for new in tokens)
            return super().prefill(slots, tokens, past, want)

    engine = Engine(Strict())
    request = engine.submit(Machine(2, [1, 2, 3], 5))
    run = engine._run

    def interrupted(batch: Any) -> None:
        run(batch)
        monkeypatch.setattr(engine, "_run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.num_requests:
        engine.step()

    assert request.error is None
    assert request.decoding.tokens == expected(request.decoding)


@pytest.mark.parametrize("when", ["before", "after"])
def test_request_of_another_thread_is_not_lost_when_taking_it_in_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = Engine(CountingRunner())
    request = engine.submit(Machine(1, [1, 2], 4))
    add = engine._scheduler.add

    def interrupted(asked: Any) -> None:
        if when == "after":
            add(asked)
        monkeypatch.setattr(engine._scheduler, "add", add)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._scheduler, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.num_requests:
        engine.step()

    assert request.done.is_set()
    assert request.decoding.tokens == expected(request.decoding)
