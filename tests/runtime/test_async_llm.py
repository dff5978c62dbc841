"""`AsyncLLM`: one engine for tasks, threads and event loops, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen_runtime import (
    LLM,
    AsyncLLM,
    BackendError,
    CapacityError,
    EngineClosedError,
    QueueFullError,
    RequestError,
)

GREEDY = {"do_sample": False, "max_new_tokens": 24}
FOREVER = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
"""Settings under which an answer does not end by itself."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(text_llm: LLM) -> Iterator[None]:
    yield
    assert text_llm._engine.num_requests == 0
    assert text_llm._engine.model.num_used_slots == 0


def run(test: Callable[[AsyncLLM], Awaitable[Any]], llm: LLM) -> Any:
    """Run a coroutine over an LLM that stays open."""

    async def whole() -> Any:
        async with asyncio.timeout(60), AsyncLLM(llm) as service:
            return await test(service)

    return asyncio.run(whole())


@asynccontextmanager
async def slow_steps(llm: LLM, seconds: float) -> AsyncIterator[None]:
    """Every decode step takes so long."""
    runner = llm._engine.model._runner
    decode = runner.decode

    def slow(slots: Any, tokens: Any) -> Any:
        time.sleep(seconds)
        return decode(slots, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "decode", slow)
        yield


def test_answers_equal_those_of_the_synchronous_interface(text_llm: LLM) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = [
        ("Hello", GREEDY),
        ("a b", {"do_sample": True, "seed": 3, "max_new_tokens": 30}),
        ("xyz", {"num_beams": 3, "max_new_tokens": 8}),
        (["one", "two", "three"], GREEDY),
        ("n", {"do_sample": True, "seed": 4, "num_return_sequences": 3, "max_new_tokens": 9}),
        ("lookup lookup lookup", {"prompt_lookup_num_tokens": 3, **GREEDY}),
        ("stop", {"stop": ["e"], "do_sample": True, "seed": 1, "max_new_tokens": 30}),
    ]
    alone = [text_llm.generate(prompt, **settings) for prompt, settings in asked]

    async def all_at_once(service: AsyncLLM) -> list[Any]:
        return await asyncio.gather(
            *(service.generate(prompt, **settings) for prompt, settings in asked * 4)
        )

    assert run(all_at_once, text_llm) == alone * 4


def test_pieces_of_a_stream_are_its_text(text_llm: LLM) -> None:
    settings = {"do_sample": True, "seed": 5, "max_new_tokens": 30, "stop": ["qq"]}
    whole = text_llm.generate("Hello", **settings)

    async def read(service: AsyncLLM) -> None:
        stream = service.stream("Hello", **settings)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert stream.output == whole
        assert [piece async for piece in stream] == []

    run(read, text_llm)


def test_chunks_bring_text_ids_and_log_probabilities_together(text_llm: LLM) -> None:
    settings = {"logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = text_llm.generate("Hello", **settings)

    async def read(service: AsyncLLM) -> None:
        stream = service.stream("Hello", **settings)
        chunks = [chunk async for chunk in stream.chunks()]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
        assert [p for chunk in chunks for p in chunk.logprobs] == whole.logprobs
        for chunk in chunks:
            assert [item.token_id for item in chunk.logprobs] == chunk.token_ids
        assert stream.logprobs == whole.logprobs

    run(read, text_llm)


def test_model_runs_on_while_nobody_reads_and_a_late_reader_gets_all(text_llm: LLM) -> None:
    whole = text_llm.generate("Hello", **GREEDY)

    async def read(service: AsyncLLM) -> None:
        stream = service.stream("Hello", **GREEDY)
        while not stream.done:
            await asyncio.sleep(0.005)
        chunks = [chunk async for chunk in stream.chunks()]
        assert [chunk.token_ids for chunk in chunks] == [whole.token_ids]
        assert chunks[0].text == whole.text

    run(read, text_llm)


def test_pieces_come_while_the_model_runs(text_llm: LLM) -> None:
    async def read(service: AsyncLLM) -> None:
        async with slow_steps(text_llm, 0.01), service.stream("Hello", **FOREVER) as stream:
            async for _ in stream:
                assert not stream.done
                break
            assert 0 < len(stream.token_ids) < 40
        assert stream.output.finish_reason == "cancelled"
        assert text_llm._engine.model.num_used_slots == 0

    run(read, text_llm)


def test_wrong_arguments_are_refused_before_anything_runs(text_llm: LLM) -> None:
    async def ask(service: AsyncLLM) -> None:
        steps = service.stats().num_steps
        with pytest.raises(RequestError, match="temprature"):
            service.stream("Hello", temprature=1.0, **GREEDY)
        with pytest.raises(RequestError, match="num_beams=2; use generate"):
            service.stream("Hello", num_beams=2, **GREEDY)
        with pytest.raises(CapacityError, match="must fit into 64 tokens"):
            service.stream("Hello", do_sample=False, max_new_tokens=10**6)
        with pytest.raises(RequestError, match="streamer follows one prompt"):
            await service.generate(["a", "b"], streamer=_Streamer(), **GREEDY)
        assert service.stats().num_steps == steps

    run(ask, text_llm)


class _Streamer:
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize("how", ["task", "aclose", "cancel", "event", "forgotten"])
def test_cancelled_stream_leaves_the_engine(text_llm: LLM, how: str) -> None:
    async def ask(service: AsyncLLM) -> None:
        event = threading.Event()
        stream = service.stream("Hello", cancel=event, **FOREVER)
        first = await anext(stream)
        assert first

        async def read_on() -> None:
            async for _ in stream:
                pass

        if how == "task":
            reader = asyncio.create_task(read_on())
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        elif how == "aclose":
            await stream.aclose()
            assert service.stats().num_running == 0
        elif how == "forgotten":
            del stream, read_on
            gc.collect()
        else:
            other = threading.Thread(target=stream.cancel if how == "cancel" else event.set)
            other.start()
            other.join()
            await read_on()
            assert stream.output.finish_reason == "cancelled"
            assert 0 < len(stream.output.token_ids) < 40
        while service.stats().num_running:
            await asyncio.sleep(0.002)

    async def slowly(service: AsyncLLM) -> None:
        async with slow_steps(text_llm, 0.01):
            await ask(service)

    run(slowly, text_llm)


def test_cancelling_a_task_that_generates_ends_all_its_requests(text_llm: LLM) -> None:
    async def ask(service: AsyncLLM) -> None:
        async with slow_steps(text_llm, 0.01):
            await cancel(service)

    async def cancel(service: AsyncLLM) -> None:
        task = asyncio.create_task(service.generate(["a", "b", "c"], **FOREVER))
        while service.stats().num_running < 3:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        steps = service.stats().num_steps
        while service.stats().num_running:
            await asyncio.sleep(0.002)
        assert service.stats().num_steps - steps <= 2

    run(ask, text_llm)


def test_error_reaches_its_reader_and_no_other(text_llm: LLM) -> None:
    good = text_llm.generate("Hello", **GREEDY)

    def fail(ids: Any, scores: Any) -> Any:
        if ids.shape[1] > 6:
            raise OverflowError("too long for me")
        return scores

    async def ask(service: AsyncLLM) -> None:
        bad = service.stream("Hello", logits_processor=[fail], **GREEDY)
        results = await asyncio.gather(
            service.generate("Hello", **GREEDY),
            service.generate(["a", "b"], logits_processor=[fail], **GREEDY),
            return_exceptions=True,
        )
        assert results[0] == good
        assert isinstance(results[1], OverflowError)
        with pytest.raises(OverflowError, match="too long for me"):
            [piece async for piece in bad]
        assert [piece async for piece in bad] == []

    run(ask, text_llm)


def test_callback_may_use_the_same_llm(text_llm: LLM) -> None:
    inner = text_llm.generate("b", **GREEDY)
    outer = text_llm.generate("a", **GREEDY)
    seen: list[Any] = []

    def ask_again(ids: Any, scores: Any) -> Any:
        if not seen:
            seen.append(text_llm.generate("b", **GREEDY))
        return scores

    async def ask(service: AsyncLLM) -> Any:
        return await service.generate("a", logits_processor=[ask_again], **GREEDY)

    assert run(ask, text_llm) == outer
    assert seen == [inner]


def test_threads_tasks_and_loops_share_one_engine(text_llm: LLM) -> None:
    prompts = ["Hello", "a", "b c", "xyz"]
    alone = [text_llm.generate(prompt, **GREEDY) for prompt in prompts]
    service = AsyncLLM(text_llm)
    results: dict[str, list[Any]] = {}

    async def tasks() -> list[Any]:
        async def read(prompt: str) -> Any:
            stream = service.stream(prompt, **GREEDY)
            text = "".join([piece async for piece in stream])
            assert text == stream.output.text
            return stream.output

        return await asyncio.gather(*(read(prompt) for prompt in prompts))

    def in_a_loop(name: str) -> None:
        results[name] = asyncio.run(tasks())

    def plainly(name: str) -> None:
        results[name] = text_llm.generate(prompts, **GREEDY)

    threads = [
        threading.Thread(target=target, args=(f"{target.__name__} {index}",))
        for target in (in_a_loop, plainly)
        for index in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert len(results) == 6
    assert all(outputs == alone for outputs in results.values())
    asyncio.run(service.aclose())


def test_stream_may_be_made_in_one_thread_and_read_in_another_loop(text_llm: LLM) -> None:
    expected = text_llm.generate("Hello", **GREEDY).text
    service = AsyncLLM(text_llm)
    stream = service.stream("Hello", **GREEDY)

    async def read() -> str:
        return "".join([piece async for piece in stream])

    assert asyncio.run(read()) == expected


def test_reader_whose_loop_was_closed_does_not_hurt_the_engine(text_llm: LLM) -> None:
    expected = text_llm.generate("Hello", **GREEDY).text
    service = AsyncLLM(text_llm)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        stream = service.stream("Hello", **FOREVER)
        await anext(stream)
        return stream

    stream = loop.run_until_complete(begin())
    waiting = stream._progress.changed
    waiting._waiters.append(loop.create_future())
    loop.close()

    async def ask() -> str:
        output = await service.generate("Hello", **GREEDY)
        await stream.aclose()
        return output.text

    assert asyncio.run(ask()) == expected


def test_drain_takes_no_more_and_waits_for_what_was_accepted(text_llm: LLM) -> None:
    expected = text_llm.generate("Hello", **GREEDY)

    async def ask(service: AsyncLLM) -> None:
        task = asyncio.create_task(service.generate("Hello", **GREEDY))
        await asyncio.sleep(0)
        assert await service.drain(timeout=30)
        assert await task == expected
        with pytest.raises(EngineClosedError, match="drained or closed"):
            service.stream("Hello", **GREEDY)
        with pytest.raises(CapacityError, match="drained or closed"):
            await service.generate("Hello", **GREEDY)

    run(ask, text_llm)
    assert text_llm.generate("Hello", **GREEDY) == expected


def test_drain_gives_up_in_time_and_closing_cancels_the_rest(text_llm: LLM) -> None:
    async def ask(service: AsyncLLM) -> None:
        async with slow_steps(text_llm, 0.02):
            stream = service.stream("Hello", **FOREVER)
            assert not await service.drain(timeout=0.05)
            await service.aclose()
        assert stream.done
        assert stream.output.finish_reason == "cancelled"

    run(ask, text_llm)


def test_full_queue_is_refused_with_its_limit(text_bundle: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(text_bundle, max_num_seqs=2, max_queued_requests=3) as service:
            runner = service.llm._engine.model._runner
            gate, decode = threading.Event(), runner.decode
            runner.decode = lambda *call: (gate.wait(30), decode(*call))[1]
            streams = [service.stream("Hello", **FOREVER) for _ in range(5)]
            with pytest.raises(QueueFullError, match=r"at most 3 requests .* got 4"):
                service.stream("Hello", **FOREVER)
            with pytest.raises(QueueFullError, match=r"at most 3 requests .* got 5"):
                await service.generate(["a", "b"], **GREEDY)
            with pytest.raises(
                CapacityError, match=r"at most 2 rows \(max_num_seqs\), got 3"
            ) as e:
                await service.generate("a", num_beams=3, **GREEDY)
            assert e.value.param == "num_beams"
            stats = service.stats()
            assert stats.max_running == 2
            assert stats.max_waiting == 3
            assert stats.num_running + stats.num_waiting == 5
            gate.set()
            for stream in streams:
                await stream.aclose()
            assert (await service.generate("Hello", **GREEDY)).token_ids
        with pytest.raises(BackendError, match="the LLM is closed"):
            service.llm.generate("Hello", **GREEDY)

    asyncio.run(ask())


def test_statistics_count_what_was_done(text_bundle: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(text_bundle) as service:
            before = service.stats()
            assert before.num_prompt_tokens == before.num_generated_tokens == before.num_steps == 0
            prompt = list(range(5, 45))
            first = await service.generate(prompt, **FOREVER | {"max_new_tokens": 9})
            sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
            again = await service.generate(prompt, eos_token_id=None, **sampled)
            after = service.stats()
            assert after.num_prompt_tokens == 80
            assert after.num_cached_tokens == again[0].num_cached_tokens > 30
            assert after.num_generated_tokens == len(first.token_ids) + 2 * 4
            assert after.num_steps == 9 + 4
            assert after.num_slots_used == after.cache_tokens_used == 0

            stream = service.stream(prompt, **FOREVER | {"max_new_tokens": 20})
            await anext(stream)
            running = service.stats()
            assert (running.num_running, running.num_slots_used) in ((1, 1), (0, 0))
            await stream.aclose()

    asyncio.run(ask())


def test_arguments_for_an_open_llm_are_refused(text_llm: LLM) -> None:
    with pytest.raises(RequestError, match="got max_num_seqs beside an open one") as error:
        AsyncLLM(text_llm, max_num_seqs=3)
    assert error.value.param == "max_num_seqs"


def test_full_queue_blames_no_setting_of_the_request(text_bundle: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(text_bundle, max_num_seqs=3, max_queued_requests=0) as service:
            with pytest.raises(QueueFullError, match="try again later") as refused:
                await asyncio.gather(
                    *(service.generate("a", num_beams=3, **GREEDY) for _ in range(2))
                )
            assert refused.value.param is None

    asyncio.run(ask())


def test_service_says_whether_it_is_alive(text_bundle: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(text_bundle) as service:
            assert service.alive
            assert (await service.generate("Hello", **GREEDY)).token_ids
            assert service.alive
            assert service.llm.alive
        assert not service.alive

    asyncio.run(ask())


@pytest.mark.parametrize("timeout", [-1, True, float("nan"), "3"])
def test_timeout_that_is_no_time_is_refused_and_drains_nothing(
    text_llm: LLM, timeout: Any
) -> None:
    async def ask(service: AsyncLLM) -> None:
        with pytest.raises(RequestError, match="timeout must be seconds >= 0") as error:
            await service.drain(timeout)
        assert error.value.param == "timeout"
        assert (await service.generate("Hello", **GREEDY)).token_ids

    run(ask, text_llm)
