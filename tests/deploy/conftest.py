"""A Ray cluster of this process, on 127.0.0.1, that leaves nothing behind."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Given here, it is not written to the user's home.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": (
        "qwen_runtime.deploy.ray_proxy:proxy_middlewares"
    ),
}


@pytest.fixture(scope="module")
def ray_url() -> Iterator[str]:
    """The address of Serve's proxy."""
    # Before Ray is imported: it reads the environment then.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # Short: a socket's path has 107 characters at most.
        folder = Path(tempfile.mkdtemp(prefix="ray-"))
        try:
            with warnings.catch_warnings():
                # Ray's own: pydantic's arguments, sockets left to the collector.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", ResourceWarning)
                yield from _cluster(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _cluster(folder: Path) -> Iterator[str]:
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
    )
    try:
        # The limit that docs/deployment.md advises: a request of a replica that was killed may
        # otherwise hear nothing at all.
        options = {"host": "127.0.0.1", "port": port, "request_timeout_s": 20}
        serve.start(http_options=options)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
