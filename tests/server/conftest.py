"""Real servers on 127.0.0.1, and clients for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from openai import OpenAI

    from qwen_runtime import LLM
    from qwen_runtime.async_llm import AsyncLLM

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MODEL = "tiny-qwen2-chat"

Serve = Callable[[Any], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an ASGI app behind uvicorn in a thread; gives its address."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), name="uvicorn"
    )
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Runs an app while a ``with`` block lasts."""
    return serving


@pytest.fixture(scope="session")
def async_llm(embedded_llm: LLM) -> AsyncLLM:
    """The embedded chat model for tasks; the same engine as ``embedded_llm``."""
    from qwen_runtime.async_llm import AsyncLLM

    return AsyncLLM(embedded_llm)


@pytest.fixture(scope="session")
def base_url(async_llm: AsyncLLM) -> Iterator[str]:
    """A server of the embedded chat model under the name `MODEL`."""
    from qwen_runtime.server import ServerSettings, create_app

    with serving(create_app(async_llm, ServerSettings(served_model_name=MODEL))) as url:
        yield url


@pytest.fixture(scope="session")
def tool_llm(
    build_bundle: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """A small model with random weights whose template knows tools and thinking."""
    from qwen_runtime import LLM

    folder = tmp_path_factory.mktemp("checkpoint") / "tools"
    shutil.copytree(GOLDEN / "models" / "qwen2_text", folder)
    shutil.copytree(GOLDEN / "tokenizer", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with LLM(build_bundle(folder)) as llm:
        yield llm


@pytest.fixture(scope="session")
def tool_url(tool_llm: LLM) -> Iterator[str]:
    """A server of that model."""
    from qwen_runtime.server import ServerSettings, create_app

    with serving(create_app(tool_llm, ServerSettings(served_model_name=MODEL))) as url:
        yield url


@pytest.fixture
def say(tool_llm: LLM) -> Iterator[Callable[[str], str]]:
    """Starts a server whose model always gives one answer, through the real engine.

    Its tokenizer and template, which knows tools and thinking, are those of ``tool_llm``.
    """
    from qwen_runtime.async_llm import AsyncLLM, AsyncTextStream
    from qwen_runtime.server import ServerSettings, create_app

    class Scripted(AsyncLLM):
        script: tuple[int, ...] = ()

        def stream(self, prompt: Any, *arguments: Any, **settings: Any) -> AsyncTextStream:
            def follow(_: int, ids: Any) -> list[int]:
                place = len(ids) - len(prompt)
                return [self.script[min(place, len(self.script) - 1)]]

            return super().stream(prompt, *arguments, prefix_allowed_tokens_fn=follow, **settings)

    llm = Scripted(tool_llm)
    tokenizer, end = tool_llm.tokenizer, tool_llm.generation_config.eos_token_id
    assert tokenizer is not None
    assert end is not None

    def follow_script(text: str) -> str:
        llm.script = (*tokenizer.encode(text), end if isinstance(end, int) else end[0])
        return url

    with serving(create_app(llm, ServerSettings(served_model_name=MODEL))) as url:
        yield follow_script


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    """A plain client of the embedded model's server."""
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    """OpenAI's client of the embedded model's server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as openai:
        yield openai
