"""How a request lives and ends: disconnects, full queues, failures, mounting, loading."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest

from qwen_runtime.async_llm import AsyncLLM, AsyncTextStream
from qwen_runtime.errors import BackendError, BundleError, CapacityError, RequestError
from qwen_runtime.server import ServerSettings, create_app

if TYPE_CHECKING:
    from qwen_runtime import LLM

Serve = Callable[[Any], AbstractContextManager[str]]

MODEL = "tiny-qwen2-chat"
CHAT = "/v1/chat/completions"
# An answer that goes on until its limit: the end tokens are out of reach.
ENDLESS: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 1500,
    "temperature": 0,
    "logit_bias": {"4093": -100, "4095": -100},
}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def is_idle(llm: AsyncLLM) -> bool:
    stats = llm.stats()
    return stats.num_running == stats.num_waiting == 0


@pytest.mark.parametrize("n", [1, 3])
def test_client_that_leaves_a_stream_frees_its_slot(
    base_url: str, async_llm: AsyncLLM, n: int
) -> None:
    with httpx.stream("POST", base_url + CHAT, json=ENDLESS | {"stream": True, "n": n}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        assert async_llm.stats().num_running == n
        before = async_llm.stats().num_generated_tokens
    until(lambda: is_idle(async_llm))
    assert async_llm.stats().num_generated_tokens - before < 1000


def test_client_that_leaves_before_the_answer_frees_its_slot(
    base_url: str, async_llm: AsyncLLM
) -> None:
    url = httpx.URL(base_url)
    body = json.dumps(ENDLESS).encode()
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
        )
        until(lambda: async_llm.stats().num_running == 1)
    before = async_llm.stats().num_generated_tokens
    until(lambda: is_idle(async_llm))
    assert async_llm.stats().num_generated_tokens - before < 1000


def test_closing_the_clients_stream_cancels_it(base_url: str, async_llm: AsyncLLM) -> None:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
        with client.chat.completions.create(**ENDLESS, stream=True) as stream:
            next(iter(stream))
        until(lambda: is_idle(async_llm))


@pytest.fixture(scope="module")
def narrow_llm(embedded_bundle: Path) -> Iterator[LLM]:
    """The embedded model with one running and one waiting request at most."""
    from qwen_runtime import LLM

    with LLM(embedded_bundle, max_num_seqs=1, max_queued_requests=1) as llm:
        yield llm


def test_full_queue_is_told_and_takes_requests_later(serve: Serve, narrow_llm: LLM) -> None:
    asked = ENDLESS | {"model": None}
    with (
        serve(create_app(narrow_llm)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        with http.stream("POST", CHAT, json=asked | {"stream": True}) as running:
            lines = running.iter_lines()
            assert next(lines).startswith("data: {")
            waiting = pool.submit(http.post, CHAT, json=asked | {"max_tokens": 2})
            until(lambda: narrow_llm.stats().num_waiting == 1)
            # Of two choices none may keep a place.
            for n in (1, 2):
                refused = http.post(CHAT, json=asked | {"n": n})
                error = refused.json()["error"]
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert error["code"] == "queue_full"
                assert error["type"] == "rate_limit_error"
        assert waiting.result(30).status_code == 200
        assert http.post(CHAT, json=asked | {"max_tokens": 2}).status_code == 200


def test_more_answers_than_could_ever_run_are_refused_for_good(
    serve: Serve, narrow_llm: LLM
) -> None:
    with serve(create_app(narrow_llm)) as url:
        refused = httpx.post(url + CHAT, json=ENDLESS | {"model": None, "n": 3})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    assert "at most 2 answers" in refused.json()["error"]["message"]


def test_one_client_more_than_there_are_slots_waits_for_its_answer(
    base_url: str, async_llm: AsyncLLM
) -> None:
    clients = async_llm.stats().max_running + 1
    questions = [[{"role": "user", "content": f"What is 17 + {i}?"}] for i in range(clients)]
    expected = async_llm.llm.generate(questions, do_sample=False, max_new_tokens=16)

    def ask(messages: list[dict[str, str]]) -> str:
        asked = {"messages": messages, "temperature": 0, "max_tokens": 16}
        response = httpx.post(base_url + CHAT, json=asked, timeout=60)
        return str(response.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(clients) as pool:
        assert list(pool.map(ask, questions)) == [output.text for output in expected]


def test_a_cache_smaller_than_the_context_limits_what_is_asked_for(
    serve: Serve, embedded_bundle: Path
) -> None:
    from qwen_runtime import LLM

    with (
        LLM(embedded_bundle, threads=1, max_cache_tokens=128) as llm,
        serve(create_app(llm)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        prompt = {
            "prompt": "one two three",
            "max_tokens": 500,
            "logit_bias": ENDLESS["logit_bias"],
        }
        answer = http.post("/v1/completions", json=prompt | {"temperature": 0})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] <= 128
        refused = http.post(CHAT, json=ENDLESS | {"model": None, "max_tokens": 200})
        assert refused.status_code == 400
        assert "must fit in 128 tokens" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_memory_that_runs_out_is_no_fault_of_the_request(
    serve: Serve, embedded_llm: LLM, stream: bool
) -> None:
    llm = FailingLLM(embedded_llm)
    llm.error = CapacityError("2 rows need more memory than there is; ask for fewer")
    with serve(create_app(llm)) as url:
        response = httpx.post(url + CHAT, json=ENDLESS | {"stream": stream, "model": None})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "more memory than there is" in response.json()["error"]["message"]


def test_a_long_text_does_not_hold_others_up(base_url: str, async_llm: AsyncLLM) -> None:
    text = "one two three " * 100_000
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=base_url, timeout=60) as http:
        assert http.get("/health/live").status_code == 200
        long = pool.submit(httpx.post, base_url + "/tokenize", json={"prompt": text}, timeout=60)
        start, waits = time.perf_counter(), []
        while not long.done():
            asked = time.perf_counter()
            assert http.get("/health/live").status_code == 200
            waits.append(time.perf_counter() - asked)
        took = time.perf_counter() - start
    assert long.result().json()["count"] > 300_000
    # With the interpreter's lock held nobody is answered meanwhile.
    assert max(waits) < took / 2


def test_an_app_takes_requests_in_a_second_lifespan_too(
    embedded_bundle: Path, embedded_llm: LLM
) -> None:
    from starlette.testclient import TestClient

    asked = ENDLESS | {"model": None, "max_tokens": 1}
    for app in (create_app(embedded_llm), create_app(embedded_bundle, threads=1)):
        for _ in range(2):
            with TestClient(app) as http:
                until(lambda http=http: http.get("/health/ready").status_code == 200, 30)  # type: ignore[misc]
                assert http.post(CHAT, json=asked).status_code == 200


class FailingLLM(AsyncLLM):
    """Whose engine fails after some tokens."""

    after = 0
    error: Exception = BackendError("the engine failed on purpose")

    def stream(self, prompt: Any, *arguments: Any, **settings: Any) -> AsyncTextStream:
        def fail(ids: np.ndarray[Any, Any], scores: Any) -> Any:
            if ids.shape[1] >= len(prompt) + self.after:
                raise self.error
            return scores

        return super().stream(prompt, *arguments, logits_processor=[fail], **settings)


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


@pytest.mark.parametrize("n", [1, 2])
def test_failure_in_mid_stream_is_the_last_event(
    serve: Serve, embedded_llm: LLM, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    llm = FailingLLM(embedded_llm)
    llm.after = 3
    body = ENDLESS | {"stream": True, "n": n, "model": None}
    with (
        serve(create_app(llm)) as url,
        httpx.stream("POST", url + CHAT, json=body, headers={"X-Request-Id": "a-7"}) as response,
    ):
        assert response.status_code == 200
        *before, last = events(response)
    assert len(before) >= 1
    assert last["error"]["code"] == "engine_failed"
    assert "on purpose" in last["error"]["message"]
    assert "request a-7 failed" in caplog.messages
    until(lambda: is_idle(llm))


@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_token_has_its_status(
    serve: Serve, embedded_llm: LLM, stream: bool
) -> None:
    llm = FailingLLM(embedded_llm)
    with serve(create_app(llm)) as url:
        response = httpx.post(url + CHAT, json=ENDLESS | {"stream": stream, "model": None})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_failed"


def test_failure_that_nobody_expected_tells_nothing(serve: Serve, embedded_llm: LLM) -> None:
    llm = FailingLLM(embedded_llm)
    llm.error = OSError("secret path")
    with serve(create_app(llm)) as url:
        response = httpx.post(url + CHAT, json=ENDLESS | {"model": None})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


def test_openai_client_raises_on_an_error_in_mid_stream(serve: Serve, embedded_llm: LLM) -> None:
    llm = FailingLLM(embedded_llm)
    llm.after = 3
    with (
        serve(create_app(llm, ServerSettings(served_model_name=MODEL))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="on purpose"),
    ):
        list(client.chat.completions.create(**ENDLESS, stream=True))


def test_engine_that_was_closed_is_unavailable(serve: Serve, embedded_llm: LLM) -> None:
    import asyncio

    llm = AsyncLLM(embedded_llm)
    with serve(create_app(llm)) as url:
        asyncio.run(llm.drain(1))
        response = httpx.post(url + CHAT, json=ENDLESS | {"model": None})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


def test_app_works_mounted_in_fastapi_under_a_prefix(serve: Serve, embedded_llm: LLM) -> None:
    from fastapi import FastAPI

    parent = FastAPI()

    @parent.get("/own")
    def own() -> str:
        return "mine"

    parent.mount("/llm", create_app(embedded_llm, ServerSettings(served_model_name=MODEL)))
    with serve(parent) as url:
        assert httpx.get(f"{url}/own").json() == "mine"
        assert httpx.get(f"{url}/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]
        with openai.OpenAI(base_url=f"{url}/llm/v1", api_key="none") as client:
            asked: dict[str, Any] = ENDLESS | {"max_tokens": 5}
            whole = client.chat.completions.create(**asked).choices[0].message.content
            chunks = client.chat.completions.create(**asked, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_bundle_is_loaded_by_the_lifespan(serve: Serve, embedded_bundle: Path) -> None:
    app = create_app(embedded_bundle, threads=1)
    with serve(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        until(lambda: http.get("/health/ready").status_code == 200, 30)
        name = http.get("/v1/models").json()["data"][0]["id"]
        assert name == embedded_bundle.name
        answer = http.post(CHAT, json=ENDLESS | {"model": name, "max_tokens": 1})
        assert answer.status_code == 200


def test_mounted_bundle_is_loaded_with_the_first_request(
    serve: Serve, embedded_bundle: Path
) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = create_app(embedded_bundle, threads=1)
    with serve(Starlette(routes=[Mount("/a", app)])) as url:
        asked = ENDLESS | {"model": None, "max_tokens": 1}
        first = httpx.post(f"{url}/a{CHAT}", json=asked)
        assert first.status_code in (200, 503)
        until(lambda: httpx.post(f"{url}/a{CHAT}", json=asked).status_code == 200, 30)


def test_bundle_without_a_tokenizer_is_refused(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError, match="has no tokenizer"):
        create_app(tiny_llm)


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="must be a bundle's folder"):
        create_app(tmp_path / "nothing")


def test_arguments_for_an_open_model_are_refused(async_llm: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="threads"):
        create_app(async_llm, threads=2)
    with pytest.raises(RequestError, match="threads"):
        create_app(async_llm.llm, threads=2)


def test_events_hold_no_line_end_but_their_own(tool_llm: LLM, say: Callable[[str], str]) -> None:
    text = "a\u2028b\u2029c\x85d"
    body = ENDLESS | {"stream": True, "logit_bias": None, "max_tokens": 100}
    with httpx.stream("POST", say(text) + CHAT, json=body, timeout=60) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == text
