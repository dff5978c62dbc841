"""The Serve application before it runs, and its replica's own code without a cluster."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen_runtime.errors import BackendError, BundleError, RequestError
from qwen_runtime.server import ServerSettings

pytestmark = [
    # Ray's modules, as they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def built(bundle: Path, *arguments: Any, **more: Any) -> Any:
    """The deployment of an application."""
    from qwen_runtime.deploy.ray_serve import build_app

    return build_app(bundle, *arguments, **more)._bound_deployment


def from_texts(arguments: dict[str, Any]) -> Any:
    """The deployment that ``serve run`` would make."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    from qwen_runtime.deploy.ray_serve import app_builder

    return call(app_builder, arguments)._bound_deployment


def autoscaling_of(deployment: Any) -> Any:
    return deployment._deployment_config.autoscaling_config


def test_a_replica_takes_what_its_engine_runs_and_queues(text_bundle: Path) -> None:
    deployment = built(text_bundle, max_num_seqs=3, max_queued_requests=5, threads=2)

    assert deployment.max_ongoing_requests == 8
    assert deployment.max_queued_requests == 5
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment.ray_actor_options["num_gpus"] == 0
    assert deployment.init_args[2]["threads"] == 2


def test_a_replica_on_the_cpu_uses_the_one_cpu_that_ray_keeps_for_it(text_bundle: Path) -> None:
    deployment = built(text_bundle)

    assert deployment.ray_actor_options["num_cpus"] == 1
    assert deployment.init_args[2] == {"threads": 1}


def test_a_replica_on_a_gpu_takes_a_whole_one(text_bundle: Path) -> None:
    deployment = built(text_bundle, device="cuda")

    assert deployment.ray_actor_options["num_gpus"] == 1
    assert deployment.init_args[2] == {"device": "cuda"}


def test_new_replicas_come_before_old_ones_go_and_those_may_finish(text_bundle: Path) -> None:
    config = built(text_bundle, ServerSettings(drain_seconds=12))._deployment_config

    assert config.max_surge_percent > 0
    assert config.graceful_shutdown_timeout_s > 12


def test_a_replica_that_hangs_is_given_up_within_the_time_that_the_page_says(
    text_bundle: Path,
) -> None:
    config = built(text_bundle)._deployment_config

    assert (config.health_check_period_s, config.health_check_timeout_s) == (5, 10)


def test_autoscaling_aims_at_full_engines_unless_told_otherwise(text_bundle: Path) -> None:
    from qwen_runtime.deploy.ray_serve import Autoscaling

    scale = Autoscaling(min_replicas=2, max_replicas=5, upscale_delay_s=3)
    config = autoscaling_of(built(text_bundle, num_replicas=scale, max_num_seqs=7))
    told = Autoscaling(max_replicas=5, target_ongoing_requests=1.5)

    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert config.target_ongoing_requests == 7
    assert config.upscale_delay_s == 3
    assert config.policy.policy_function == "qwen_runtime.deploy.ray_serve:queue_depth_policy"
    assert autoscaling_of(built(text_bundle, num_replicas=told)).target_ongoing_requests == 1.5


@pytest.mark.parametrize(
    ("of_engines", "of_serve", "queued", "replicas"),
    [
        ({}, 12.0, 0.0, 3.0),
        ({"a": 2.0, "b": 3.0}, 12.0, 0.0, 3.0),
        ({"a": 20.0, "b": 3.0}, 12.0, 1.0, 6.0),
        ({"a": 0.0}, 0.0, 0.0, 0.0),
    ],
)
def test_the_policy_follows_the_engines_where_they_count_more_than_serve(
    of_engines: dict[str, float], of_serve: float, queued: float, replicas: float
) -> None:
    from qwen_runtime.deploy.ray_serve import queue_depth_policy

    context: Any = SimpleNamespace(
        aggregated_metrics={"engine_requests": of_engines},
        total_num_requests=of_serve,
        total_queued_requests=queued,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4.0),
    )

    assert queue_depth_policy(context) == (replicas, {})


def test_texts_of_a_command_line_become_arguments(text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n", "utf-8")
    deployment = from_texts(
        {
            "bundle": str(text_bundle),
            "num_replicas": "2",
            "max_replicas": "4",
            "threads": "1",
            "page": "false",
            "cors_origins": "https://a.example,https://b.example",
            "api_key_file": str(tmp_path / "keys"),
            "drain_seconds": "7.5",
        }
    )
    path, settings, _ = deployment.init_args

    assert path == str(text_bundle.resolve())
    assert settings == ServerSettings(
        page=False,
        cors_origins=("https://a.example", "https://b.example"),
        api_keys=("secret",),
        drain_seconds=7.5,
    )
    config = autoscaling_of(deployment)
    assert (config.min_replicas, config.max_replicas) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundel": "x"}, "bundel is no argument of this application; they are api_key_file"),
        ({"num_replicas": True}, "num_replicas must not be True"),
        ({"num_replicas": "two"}, r"num_replicas\n.*valid integer"),
        ({"num_replicas": 0}, "num_replicas must be an integer >= 1, got 0"),
        ({"drain_seconds": "nan"}, r"drain_seconds\n.*finite number"),
        ({"device": "tpu"}, r"device\n.*'cpu' or 'cuda'"),
        ({"target_ongoing_requests": 2}, "must come with max_replicas"),
        ({"max_replicas": 2, "num_replicas": 3}, "max_replicas must be an integer >= 3, got 2"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer >= 1, got 0"),
        ({"api_key_file": "/nowhere"}, "the file of API keys must be readable"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    text_bundle: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_texts({"bundle": str(text_bundle), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqs": 1}, "max_seqs is no argument of a replica; they are backend, device"),
        ({"num_replicas": True}, "num_replicas must be an integer >= 1, got True"),
        ({"threads": 2, "device": "cuda"}, 'threads must be None for device "cuda"'),
        ({"threads": 0}, "threads must be an integer >= 1, got 0"),
        ({"prefix_cache_slots": -1}, "prefix_cache_slots must be an integer >= 0, got -1"),
        ({"max_num_seqs": None}, "max_num_seqs must be an integer >= 1, got None"),
        ({"settings": ServerSettings(port=9000)}, "port is the proxies' .* got 9000"),
    ],
)
def test_wrong_arguments_of_the_function_are_refused_by_name(
    text_bundle: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        built(text_bundle, **arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_replicas": 0}, "max_replicas must be an integer >= 1, got 0"),
        ({"max_replicas": 2, "min_replicas": 0}, "min_replicas must be an integer >= 1, got 0"),
        ({"max_replicas": 2, "target_ongoing_requests": 0}, "must be > 0 or None, got 0"),
        ({"max_replicas": 2, "upscale_delay_s": float("inf")}, "finite number >= 0, got inf"),
        ({"max_replicas": 2, "downscale_delay_s": True}, "finite number >= 0, got True"),
    ],
)
def test_wrong_scaling_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    from qwen_runtime.deploy.ray_serve import Autoscaling

    with pytest.raises(RequestError, match=message):
        Autoscaling(**values)


def test_a_folder_that_is_no_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="manifest"):
        built(tmp_path)


def test_a_replica_is_ready_with_its_model_and_unhealthy_without_its_engine(
    text_bundle: Path,
) -> None:
    from qwen_runtime.deploy.ray_serve import QwenServer

    go_on = threading.Event()

    def hold(_: np.ndarray, scores: np.ndarray) -> np.ndarray:
        go_on.wait(30)
        return scores

    async def live() -> None:
        server = QwenServer(str(text_bundle), ServerSettings(), {"threads": 1})
        with pytest.raises(BackendError, match="the model is not loaded"):
            await server.check_health()
        assert await server.record_autoscaling_stats() == {"engine_requests": 0.0}
        app = await server.__serve_build_asgi_app__()
        await server.check_health()
        llm = app.state.lifecycle.llm
        stream = llm.stream("Hello", max_new_tokens=8, logits_processor=[hold])
        assert await server.record_autoscaling_stats() == {"engine_requests": 1.0}
        go_on.set()
        await stream.aclose()
        llm.llm._engine.close()
        with pytest.raises(BackendError, match="the engine's thread has ended"):
            await server.check_health()
        await app.state.lifecycle.stop()

    asyncio.run(live())


def test_a_replica_whose_model_cannot_be_loaded_does_not_start(
    text_bundle: Path, tmp_path: Path
) -> None:
    from qwen_runtime.deploy.ray_serve import QwenServer

    server = QwenServer(str(tmp_path), ServerSettings(), {})
    with pytest.raises(BundleError, match="manifest"):
        asyncio.run(server.__serve_build_asgi_app__())


def test_the_application_travels_to_other_machines(text_bundle: Path) -> None:
    deployment = built(text_bundle, ServerSettings(api_keys=("secret",)), threads=1)

    assert pickle.loads(pickle.dumps(deployment.init_args)) == deployment.init_args


def test_ray_that_is_not_installed_is_named_with_its_remedy() -> None:
    code = "import sys; sys.modules['ray'] = None; import qwen_runtime.deploy.ray_serve"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "ModuleNotFoundError: Ray Serve must be installed" in done.stderr.splitlines()[-1]
    assert "pip install 'qwen-export[ray]'" in done.stderr.splitlines()[-1]
