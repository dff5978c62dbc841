"""Who steps: waiting threads, and the engine's own thread for requests nobody waits for."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from engine_doubles import CountingRunner, Machine, expected

from qwen_runtime import BackendError, CapacityError, QueueFullError
from qwen_runtime.engine import EngineDriver, EngineLimits, Request
from qwen_runtime.engine.pump import Pump


@pytest.fixture
def driver() -> Iterator[EngineDriver]:
    driver = EngineDriver(CountingRunner(), limits=EngineLimits(max_num_seqs=2))
    yield driver
    driver.close()


def background(machine: Machine, **arguments: Any) -> Request:
    return Request(machine, background=True, **arguments)


def ended(*requests: Request) -> bool:
    return all(request.done.wait(timeout=30) for request in requests)


def test_engine_thread_runs_what_nobody_waits_for(driver: EngineDriver) -> None:
    machines = [Machine(1, [1, 2, 3], 5), Machine(2, [4], 3), Machine(1, [5, 6], 9)]
    requests = [background(machine) for machine in machines]

    driver.submit(requests)

    assert ended(*requests)
    assert [machine.tokens for machine in machines] == [expected(m) for m in machines]
    assert driver.num_requests == 0
    assert driver.model.num_used_slots == 0


def test_waiting_callers_and_the_engine_thread_serve_the_same_engine(
    driver: EngineDriver,
) -> None:
    threads, machines = [], [Machine(1, [index, 3], 40) for index in range(6)]
    endless = background(Machine(1, [1], 100_000))
    driver.submit([endless])

    for machine in machines:
        threads.append(threading.Thread(target=driver.drain, args=([Request(machine)],)))
        threads[-1].start()
    for thread in threads:
        thread.join(timeout=60)

    assert [machine.tokens for machine in machines] == [expected(m) for m in machines]
    assert not endless.done.is_set()
    endless.cancel()
    assert ended(endless)


def test_cancelled_request_leaves_its_slot_within_one_step() -> None:
    class Watched(CountingRunner):
        def decode(self, slots: Any, tokens: Any) -> Any:
            used.append(len(slots))
            if len(used) == 5:
                request.cancel()
            return super().decode(slots, tokens)

    used: list[int] = []
    request, other = (background(Machine(1, [1], 1000 if i else 12)) for i in (1, 0))
    driver = EngineDriver(Watched())
    driver.submit([request, other])

    assert ended(request, other)
    assert used[:5] == [2] * 5
    assert set(used[5:]) == {1}
    driver.close()


def test_error_belongs_to_its_request(driver: EngineDriver) -> None:
    class Broken(Machine):
        def accept(self, logits: Any) -> None:
            if len(self.tokens[0]) == 2:
                raise SystemExit("out")
            super().accept(logits)

    bad, good = background(Broken(1, [1], 9)), background(Machine(1, [2], 9))
    driver.submit([bad, good])

    assert ended(bad, good)
    assert isinstance(bad.error, SystemExit)
    assert good.error is None
    assert driver.alive


def test_bug_in_a_step_ends_its_requests_and_not_the_thread(
    driver: EngineDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bool:
        raise AssertionError("a bug")

    request = background(Machine(1, [1], 9))
    with monkeypatch.context() as patch:
        patch.setattr(driver._engine, "step", broken)
        driver.submit([request])
        assert ended(request)
    later = background(Machine(1, [1], 9))
    driver.submit([later])

    assert isinstance(request.error, AssertionError)
    assert ended(later)
    assert later.error is None


def test_closing_ends_what_runs_and_waits_with_an_error(driver: EngineDriver) -> None:
    requests = [background(Machine(1, [1], 100_000)) for _ in range(5)]
    driver.submit(requests)

    driver.close()

    assert ended(*requests)
    assert {str(r.error) for r in requests} == {"the LLM is closed; open the bundle again"}
    assert not driver.alive
    assert driver.model.num_used_slots == 0
    with pytest.raises(BackendError, match="the LLM is closed"):
        driver.submit([background(Machine(1, [1], 1))])


def test_full_queue_is_refused_at_once_and_takes_requests_again_later() -> None:
    limits = EngineLimits(max_num_seqs=2, max_queued_requests=3)
    driver = EngineDriver(CountingRunner(), limits=limits)
    running = [background(Machine(1, [1], 100_000)) for _ in range(2)]
    waiting = [background(Machine(1, [2], 3)) for _ in range(3)]
    driver.submit(running)
    driver.submit(waiting)

    message = r"at most 3 requests may wait \(max_queued_requests\), got 4; try again later"
    with pytest.raises(QueueFullError, match=message):
        driver.submit([background(Machine(1, [2], 3))])
    with pytest.raises(QueueFullError, match="got 4"):
        driver.drain([Request(Machine(1, [2], 3))])
    while driver.stats().num_running < 2:
        time.sleep(0.001)
    assert driver.stats().num_waiting == 3
    for request in running:
        request.cancel()
    assert ended(*waiting)
    driver.drain([Request(Machine(1, [2], 3)) for _ in range(50)])
    driver.close()


def test_requests_that_could_run_at_once_are_no_queue() -> None:
    driver = EngineDriver(
        CountingRunner(), limits=EngineLimits(max_num_seqs=4, max_queued_requests=0)
    )
    requests = [background(Machine(1, [1], 3)) for _ in range(4)]

    driver.submit(requests)

    assert ended(*requests)
    with pytest.raises(QueueFullError, match=r"at most 0 requests may wait .* got 1;"):
        driver.submit([background(Machine(1, [1], 3)) for _ in range(5)])
    driver.close()


def test_request_that_can_never_run_is_refused_at_once() -> None:
    limits = EngineLimits(max_num_seqs=4, max_cache_tokens=100)
    driver = EngineDriver(CountingRunner(), limits=limits)

    with pytest.raises(CapacityError, match=r"at most 4 rows \(max_num_seqs\), got 5"):
        driver.submit([background(Machine(5, [1], 3))])
    message = r"at most 100 tokens of KV cache \(max_cache_tokens\), got 3 rows of 40 tokens"
    with pytest.raises(CapacityError, match=message):
        driver.submit([background(Machine(3, [1], 3), num_tokens=40)])
    # Its own caller may run a request of many rows, with nothing beside it.
    driver.drain([Request(Machine(5, [1], 3))])
    driver.close()


def test_request_waits_for_memory_that_others_hold() -> None:
    class Small(CountingRunner):
        def allocate(self, slots: int, capacity: int) -> None:
            if slots > 3:
                raise CapacityError(f"{slots} slots")
            super().allocate(slots, capacity)

    driver = EngineDriver(Small(), kept_slots=0)
    requests = [background(Machine(1, [index], 6)) for index in range(1, 9)]
    driver.submit(requests)

    assert ended(*requests)
    for request in requests:
        assert request.error is None
        assert request.decoding.tokens == expected(request.decoding)
    driver.close()


def test_forgotten_engine_is_freed_and_its_thread_ends() -> None:
    driver = EngineDriver(CountingRunner())
    request = background(Machine(1, [1], 3))
    driver.submit([request])
    assert ended(request)
    thread, freed = driver._pump._thread, weakref.ref(driver)

    del driver, request
    gc.collect()
    assert thread is not None
    thread.join(timeout=30)

    assert freed() is None
    assert not thread.is_alive()


def test_stopped_pump_starts_no_thread() -> None:
    class Idle:
        def work(self) -> bool:
            return False

    idle = Idle()
    pump = Pump(idle.work, "test")
    pump.stop(wait=True)
    pump.wake()

    assert not pump.alive
    assert pump._thread is None


def test_request_that_comes_while_the_engine_closes_is_refused_or_ended(
    driver: EngineDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, request = driver._engine.add, background(Machine(1, [1], 3))

    def overtaken(requests: Any) -> None:
        driver.close()
        add(requests)

    monkeypatch.setattr(driver._engine, "add", overtaken)

    with pytest.raises(BackendError, match="the LLM is closed"):
        driver.submit([request])
    assert driver.num_requests == 0


def test_dead_engine_thread_is_an_error_and_no_endless_wait(
    driver: EngineDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(error: BaseException) -> None:
        raise AssertionError("a bug in the bug's handler")

    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(driver._engine, "step", broken)
        patch.setattr(driver._engine, "fail_background", broken)
        driver.submit([background(Machine(1, [1], 3))])
        assert driver._pump._thread is not None
        driver._pump._thread.join(timeout=30)

    assert not driver.alive
    with pytest.raises(BackendError, match="the engine's thread has died; open the bundle again"):
        driver.submit([background(Machine(1, [1], 3))])


@pytest.mark.parametrize("kept_slots", [0, 4])
@pytest.mark.parametrize("scarce", ["rows", "memory"])
def test_callback_that_generates_needs_no_room_that_its_own_request_holds(
    scarce: str, kept_slots: int
) -> None:
    class OneSlot(CountingRunner):
        def allocate(self, slots: int, capacity: int) -> None:
            if scarce == "memory" and slots > 1:
                raise CapacityError("one slot only")
            super().allocate(slots, capacity)

    class Asking(Machine):
        def accept(self, logits: Any) -> None:
            if not inner.tokens[0][1:]:
                driver.drain([Request(inner)])
            super().accept(logits)

    limits = EngineLimits(max_num_seqs=1 if scarce == "rows" else 4)
    driver = EngineDriver(OneSlot(), kept_slots=kept_slots, limits=limits)
    inner, outer = Machine(1, [2], 3), background(Asking(1, [1], 3))

    driver.submit([outer])

    assert ended(outer)
    if scarce == "rows":
        assert outer.error is None
        assert inner.tokens == expected(inner)
    else:
        assert isinstance(outer.error, CapacityError)
    driver.close()


def test_list_of_one_caller_takes_one_place_in_the_queue() -> None:
    limits = EngineLimits(max_num_seqs=2, max_queued_requests=2)
    driver = EngineDriver(CountingRunner(), limits=limits)
    caller = threading.Event()

    class Waiting(Machine):
        def accept(self, logits: Any) -> None:
            assert caller.wait(30)
            super().accept(logits)

    many = [Request(Waiting(1, [1], 3)) for _ in range(30)]
    thread = threading.Thread(target=driver.drain, args=(many,))
    thread.start()
    while driver.num_requests < 30:
        time.sleep(0.001)
    other = background(Machine(1, [2], 3))
    driver.submit([other])
    with pytest.raises(QueueFullError, match=r"at most 2 requests .* got 3;"):
        driver.submit([background(Machine(1, [2], 3))])
    caller.set()
    thread.join(timeout=30)

    assert ended(other)
    assert not thread.is_alive()
    driver.close()
