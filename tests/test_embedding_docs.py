"""The examples of docs/embedding.md, run as they stand."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from qwen_runtime import LLM

DOCUMENT = Path(__file__).parents[1] / "docs" / "embedding.md"
SERVICE, JOB, THREADS = re.findall(
    r"^```python\n(.*?)^```", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
)
END_TOKENS = (4093, 4095)
QUESTIONS = ["What is 17 + 25?", "What is the capital of France?", "Who are you?"]


@pytest.fixture
def artifacts(embedded_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the bundle where the examples look for it."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "tiny-qwen2-chat").symlink_to(embedded_bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str) -> dict[str, Any]:
    """Run an example as a module; gives its names."""
    module = ModuleType("embedding_example")
    exec(compile(block, str(DOCUMENT), "exec"), module.__dict__)
    return module.__dict__


@contextmanager
def serving(app: Any) -> Iterator[httpx.Client]:
    """Run an ASGI app behind uvicorn; gives a client."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with httpx.Client(
                base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60
            ) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def greedy(llm: LLM, question: str, max_new_tokens: int = 64) -> str:
    messages = [{"role": "user", "content": question}]
    text: str = llm.generate(messages, do_sample=False, max_new_tokens=max_new_tokens).text
    return text


@pytest.mark.usefixtures("artifacts")
def test_the_service_answers_by_its_own_routes_and_those_mounted_in_it(embedded_llm: LLM) -> None:
    app = run(SERVICE)["app"]
    expected = greedy(embedded_llm, QUESTIONS[0])
    with serving(app) as client:
        whole = client.post("/answer", json={"text": QUESTIONS[0]}).json()
        assert (whole["text"], whole["finish_reason"]) == (expected, "stop")
        with client.stream("POST", "/stream", json={"text": QUESTIONS[0]}) as response:
            pieces = list(response.iter_text())
        assert "".join(pieces) == expected
        assert len(pieces) > 1
        mounted = client.post(
            "/llm/v1/chat/completions",
            json={"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0},
        ).json()
        assert mounted["choices"][0]["message"]["content"] == expected
        health = client.get("/llm/health").json()
        assert health["engine"]["max_running"] == 8
        assert health["engine"]["num_running"] == 0


@pytest.mark.usefixtures("artifacts")
def test_the_service_refuses_what_cannot_be_answered_before_a_stream_begins() -> None:
    with serving(run(SERVICE)["app"]) as client:
        for path in ("/answer", "/stream"):
            wrong = client.post(path, json={"text": "Hi", "max_tokens": 0})
            assert (wrong.status_code, "max_new_tokens" in wrong.json()["error"]) == (400, True)
            long = client.post(path, json={"text": "word " * 5000})
            assert (long.status_code, "tokens" in long.json()["error"]) == (400, True)


@pytest.mark.usefixtures("artifacts")
def test_a_client_that_leaves_the_service_s_stream_frees_its_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = run(SERVICE)["app"]
    with serving(app) as client:
        llm = app.state.llm
        # No answer may end by itself: its slot would be free whether its client left or not.
        endless = partial(llm.stream, logit_bias=dict.fromkeys(END_TOKENS, -100.0))
        monkeypatch.setattr(llm, "stream", endless)
        question = {"text": "Count to ten.", "max_tokens": 1500}
        with client.stream("POST", "/stream", json=question) as response:
            next(response.iter_raw())
            assert llm.stats().num_running == 1
        deadline = time.monotonic() + 20
        while llm.stats().num_running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert llm.stats().num_generated_tokens < 1500


def test_the_batch_job_goes_on_where_it_was_interrupted(
    artifacts: Path, embedded_llm: LLM
) -> None:
    names = run(JOB)
    names["BATCH"] = 2
    questions, answers = artifacts / "questions.jsonl", artifacts / "answers.jsonl"
    texts = [*QUESTIONS[:2], "word " * 5000, *QUESTIONS[2:], "Count to three."]
    rows = [{"id": number, "question": text} for number, text in enumerate(texts)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    assert names["run"](questions, answers) == 5

    whole = answers.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]
    assert "fit" in records[2]["error"]
    for record in records:
        if "error" not in record:
            assert record["answer"] == greedy(embedded_llm, texts[record["id"]])

    lines = whole.splitlines(keepends=True)
    kept = lines[0].replace(b'"id": 0', b'"id": "kept"')
    answers.write_bytes(kept + lines[1][:-4])

    assert names["run"](questions, answers) == 4
    assert answers.read_bytes() == kept + b"".join(lines[1:])
    assert names["run"](questions, answers) == 0


@pytest.mark.usefixtures("artifacts")
def test_threads_get_the_answers_of_single_calls_and_one_is_cut(embedded_llm: LLM) -> None:
    names = run(THREADS)
    expected = [
        embedded_llm.generate(
            [{"role": "user", "content": question}], seed=number, max_new_tokens=32
        ).text
        for number, question in enumerate(names["questions"])
    ]
    assert names["texts"] == expected
    assert names["cut"].finish_reason == "cancelled"
