"""Replicas in a real Ray cluster, behind Serve's proxy, asked by OpenAI's client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from ray_load import KEY, MODEL, QUESTIONS, ask, client_of, load, until

from qwen_runtime import LLM

if TYPE_CHECKING:
    from ray import serve

pytestmark = [
    pytest.mark.slow,
    # Ray's modules and its connections to its processes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
APP = "qwen"
DRAIN_SECONDS = 20.0


def application(bundle: Path) -> serve.Application:
    from qwen_runtime.deploy.ray_serve import build_app
    from qwen_runtime.server import ServerSettings

    settings = ServerSettings(
        served_model_name=MODEL, api_keys=(KEY,), drain_seconds=DRAIN_SECONDS
    )
    return build_app(bundle, settings, num_replicas=2)


def replicas() -> set[str]:
    """Names of the actors that are replicas now."""
    from ray.util import list_named_actors

    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return {name for name in names if name.startswith("SERVE_REPLICA::")}


def is_whole() -> bool:
    from ray import serve

    state = serve.status().applications[APP]
    (deployment,) = state.deployments.values()
    counts = {str(name): count for name, count in deployment.replica_states.items()}
    return state.status == "RUNNING" and counts == {"RUNNING": 2}


@pytest.fixture(scope="module")
def url(ray_url: str, embedded_bundle: Path) -> str:
    """The service: two replicas of the embedded model."""
    from ray import serve

    serve.run(application(embedded_bundle), name=APP)
    return ray_url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(embedded_llm: LLM) -> dict[str, str]:
    return _answers(embedded_llm)


def _answers(llm: LLM) -> dict[str, str]:
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.generate(prompts, do_sample=False, max_new_tokens=24)
    return {question: output.text for question, output in zip(QUESTIONS, outputs, strict=True)}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_through_the_proxy_equal_those_of_the_llm(
    client: openai.OpenAI, expected: dict[str, str], stream: bool
) -> None:
    answers = {question: ask(client, question, stream=stream)[0] for question in QUESTIONS}

    assert answers == expected


def test_a_stream_comes_through_the_proxy_piece_by_piece(client: openai.OpenAI) -> None:
    with long_answer(client) as chunks:
        first = next(iter(chunks))

        assert first.choices[0].finish_reason is None


def test_request_ids_come_back_once_given_or_not(url: str) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    given = httpx.get(f"{url}/v1/models", headers={**headers, "x-request-id": "mine-1"})
    none = httpx.get(f"{url}/v1/models", headers=headers)

    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert len(none.headers.get_list("x-request-id")) == 1


def test_errors_come_through_the_proxy_unchanged(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="bogus is not a known field") as refused:
        ask(client, "Hello", stream=True, extra_body={"bogus": 1})
    unknown = pytest.raises(openai.AuthenticationError, match="this one is not known")
    with client_of(url, api_key="wrong") as stranger, unknown:
        ask(stranger, "Hello", stream=False)

    assert refused.value.param == "bogus"


def test_health_is_open_through_the_proxy(url: str) -> None:
    assert httpx.get(f"{url}/health/ready").text == "ok\n"
    assert httpx.get(f"{url}/-/healthz").text == "success"


def test_the_time_limit_of_the_proxy_ends_streams_with_an_error_event_and_others_with_408(
    client: openai.OpenAI,
) -> None:
    limit = {"x-request-timeout-seconds": "0.5"}
    late = pytest.raises(openai.APIError, match="the proxy's request_timeout_s is over")
    with long_answer(client, extra_headers=limit) as chunks, late as ended:
        list(chunks)
    with pytest.raises(openai.APIStatusError, match="Error code: 408"):
        long_answer(client, extra_headers=limit, stream=False)

    assert ended.value.code == "server_unavailable"


def test_a_replica_killed_under_load_costs_clients_no_more_than_a_retry(
    url: str, expected: dict[str, str]
) -> None:
    import ray

    until(is_whole, 60)
    before = replicas()
    with load(url) as seen:
        until(lambda: len(seen.answers) > 50, 60)
        ray.kill(ray.get_actor(sorted(before)[0], namespace="serve"))
        until(lambda: is_whole() and len(replicas() - before) == 1, 60)
        since = len(seen.answers)
        until(lambda: len(seen.answers) > since + 50, 60)

    assert seen.retried, "no request was lost: the test kills too late"
    assert {(question, text) for question, text, _ in seen.answers} == set(expected.items())


def test_a_new_bundle_takes_over_under_load_without_an_error(
    url: str, embedded_bundle: Path, draft_bundle: Path, expected: dict[str, str]
) -> None:
    from ray import serve

    until(is_whole, 60)
    old = replicas()
    with load(url) as seen:
        until(lambda: len(seen.answers) > 20, 60)
        serve.run(application(draft_bundle), name=APP)
        until(lambda: is_whole() and not replicas() & old, 60)
        since = len(seen.answers)
        until(lambda: len(seen.answers) > since + 50, 60)

    assert seen.retried == []
    first, last = seen.answers[0][2], seen.answers[-1][2]
    assert first != last
    with LLM(draft_bundle) as draft:
        by_bundle = {first: expected, last: _answers(draft)}
    assert {print_ for *_, print_ in seen.answers} == set(by_bundle)
    wrong = [answer for answer in seen.answers if by_bundle[answer[2]][answer[0]] != answer[1]]
    assert wrong == []
    assert {print_ for *_, print_ in seen.answers[since + 10 :]} == {last}


def test_a_request_that_runs_while_the_application_is_deleted_is_finished(
    client: openai.OpenAI,
) -> None:
    from ray import serve

    with long_answer(client) as stream:
        chunks = iter(stream)
        next(chunks)
        deleting = threading.Thread(target=serve.delete, args=(APP,))
        deleting.start()
        reason = [chunk.choices[0].finish_reason for chunk in chunks][-1]
        deleting.join(DRAIN_SECONDS + 10)

    assert reason == "length"
    assert not deleting.is_alive()
    assert replicas() == set()


def long_answer(client: openai.OpenAI, **more: Any) -> Any:
    """An answer of 1,500 tokens, which takes seconds; a stream unless told otherwise."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Hello",
        "temperature": 0,
        "max_tokens": 1500,
        "logit_bias": {"4093": -100, "4095": -100},
        "stream": True,
    }
    return client.completions.create(**asked | more)
