"""`qwen-run serve` as users call it, and its end under load."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from slow_server import NUM_TOKENS

from qwen_runtime import LLM
from qwen_runtime.cli import main

SLOW_SERVER = Path(__file__).parents[1] / "slow_server.py"
QUESTION = {"role": "user", "content": "What is 17 + 25?"}
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")

Log = Callable[[], str]


@contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server; gives it and its address, once it has printed that."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **(environment or {})}
        )
    try:
        deadline = time.monotonic() + 60
        while (found := ADDRESS.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield process, found.group()
    finally:
        process.kill()
        process.wait()


def serve_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "qwen_runtime", "serve", *map(str, arguments)]


def stream(url: str) -> list[str]:
    """The data of every event of a long answer."""
    body = {"messages": [QUESTION], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line]


@contextmanager
def streams(url: str, number: int) -> Iterator[Callable[[], list[list[str]]]]:
    """Read long answers in threads while the block lasts; gives what waits for them."""
    with ThreadPoolExecutor(number) as pool:
        reading = [pool.submit(stream, url) for _ in range(number)]
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/health").json()["engine"]["num_generated_tokens"] < 2 * number:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield lambda: [each.result(60) for each in reading]


def test_serve_answers_like_the_library_until_it_is_told_to_stop(
    embedded_bundle: Path, embedded_llm: LLM, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = serve_command(
        *(embedded_bundle, "--port", "0", "--threads", "1", "--log-format", "json"),
        *("--served-model-name", "tiny", "--max-num-seqs", "3", "--max-queued-requests", "5"),
    )
    environment = {"QWEN_RUN_API_KEY": "sesame"}
    with running(command, log, environment) as (process, url):
        denied = httpx.post(f"{url}/v1/chat/completions", json={"messages": [QUESTION]})
        assert denied.status_code == 401
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [QUESTION], "temperature": 0},
            headers={"authorization": "Bearer sesame"},
            timeout=60,
        )
        expected = embedded_llm.generate([QUESTION], do_sample=False, max_new_tokens=64)
        assert answer.json()["choices"][0]["message"]["content"] == expected.text
        health = httpx.get(f"{url}/health").json()
        assert (health["engine"]["max_running"], health["engine"]["max_waiting"]) == (3, 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    announced, example, *lines = log.read_text().splitlines()
    assert announced == f"tiny is served at {url}; Ctrl-C stops it. Try:"
    assert example.startswith(f'  curl {url}/v1/chat/completions -H "Authorization: Bearer $QWEN')
    assert '{"model": "tiny", "messages": [' in example
    records = [json.loads(line) for line in lines]
    assert [record.get("status") for record in records] == [401, 200, None]
    assert "sesame" not in log.read_text()
    assert "17 + 25" not in "".join(lines)


@pytest.mark.slow
def test_a_signal_lets_running_answers_end_and_takes_no_new_ones(
    embedded_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SLOW_SERVER), str(embedded_bundle), "60"]
    with running(command, tmp_path / "log") as (process, url), streams(url, 4) as answers:
        assert httpx.get(f"{url}/health/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while httpx.get(f"{url}/health/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert httpx.get(f"{url}/health/live").status_code == 200
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": [QUESTION]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "is stopping" in refused.json()["error"]["message"]
        for events in answers():
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(10) == 0


@pytest.mark.slow
def test_answers_that_outlive_the_drain_end_with_an_error(
    embedded_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SLOW_SERVER), str(embedded_bundle), "0.3"]
    with running(command, tmp_path / "log") as (process, url), streams(url, 4) as answers:
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        for events in answers():
            assert len(events) < NUM_TOKENS
            error = json.loads(events[-1])["error"]
            assert "its 0.3 s for running requests are over" in error["message"]
            assert error["type"] == "server_error"
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
    assert "4 requests were cut" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(
    embedded_bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, str(SLOW_SERVER), str(embedded_bundle), "60"]
    log = tmp_path / "log"
    with running(command, log) as (process, url):
        body = {"messages": [QUESTION], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            process.send_signal(number)
            deadline = time.monotonic() + 5
            while "stopping" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(2) == -number


def test_probes_are_answered_while_the_model_is_loaded_and_a_signal_ends_that(
    embedded_bundle: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = (
        "import time\n"
        "from qwen_runtime.cli import main\n"
        "from qwen_runtime.server import app\n"
        "class Slow(app.AsyncLLM):\n"
        "    def __init__(self, *args, **arguments):\n"
        "        time.sleep(2)\n"
        "        super().__init__(*args, **arguments)\n"
        "app.AsyncLLM = Slow\n"
        "main()\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", script, "serve", str(embedded_bundle), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport) as client:
            ready = client.get("/health/ready")
            assert ready.status_code == 503
            assert ready.text.startswith("the model is being loaded")
            assert client.get("/health/live").status_code == 200
            early = client.post("/v1/chat/completions", json={"messages": [QUESTION]})
            assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert "is served at" not in log.read_text()


def refused(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_a_port_in_use_is_one_clear_error(embedded_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = refused(embedded_bundle, "--port", str(port))
    assert code == 1
    assert error == (
        f"Error: the server must listen on 127.0.0.1 port {port}, but cannot: Address already in "
        "use; choose another --host or --port (0 takes a free one)\n"
    )


def test_a_host_that_is_none_is_one_clear_error(embedded_bundle: Path) -> None:
    code, error = refused(embedded_bundle, "--host", "no.such.host.invalid")
    assert code == 1
    assert error.startswith("Error: the server must listen on no.such.host.invalid port 8000, but")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--api-key", "two words"), 1, "api_keys must be texts of visible ASCII"),
        (("--api-key-file", "missing"), 1, "the file of API keys must be readable, but missing"),
        (("--cors-origin", "example.com"), 1, 'cors_origins must be "*" or like https://'),
        (("--served-model-name", " "), 1, "served_model_name must be a printable name"),
        (("--drain-seconds", "nan"), 1, "drain_seconds must be a finite number"),
        (("--port", "65536"), 2, "65536 is not in the range"),
        (("--max-num-seqs", "0"), 2, "0 is not in the range"),
        (("--log-format", "xml"), 2, "'xml' is not one of"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(
    embedded_bundle: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    exit_code, error = refused(embedded_bundle, *arguments)
    assert exit_code == code
    assert message in error
    assert "two words" not in error


def test_an_empty_key_in_the_environment_does_not_open_the_server(
    embedded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_RUN_API_KEY", " ")
    code, error = refused(embedded_bundle)
    assert code == 1
    assert error.startswith("Error: QWEN_RUN_API_KEY must hold a key, but it is empty")


def test_a_bundle_without_a_tokenizer_is_one_clear_error(tiny_llm: LLM) -> None:
    code, error = refused(tiny_llm.bundle.path)
    assert code == 1
    assert error.startswith("Error: a server answers in text, but ")
    assert error.count("\n") == 1


def test_a_folder_that_is_no_bundle_is_one_clear_error(tmp_path: Path) -> None:
    code, error = refused(tmp_path)
    assert code == 1
    assert error.startswith("Error: ")
    assert str(tmp_path) in error


def test_an_engine_that_cannot_be_opened_ends_the_server_with_its_error(
    embedded_bundle: Path,
) -> None:
    code, error = refused(embedded_bundle, "--port", "0", "--backend", "tensorrt")
    assert code == 1
    assert error.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in error


def test_without_the_extra_the_error_names_it(embedded_bundle: Path) -> None:
    script = (
        "import sys; sys.modules['starlette'] = None\nfrom qwen_runtime.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", str(embedded_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("this command needs pip install 'qwen-export[serve]'\n")
    assert done.stderr.startswith("Error: starlette")
