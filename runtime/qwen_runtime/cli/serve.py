"""``qwen-run serve``: a bundle behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qwen_runtime.cli.support import reports
from qwen_runtime.errors import QwenRuntimeError, RequestError

__all__ = ["serve"]

_KEY_VARIABLE = "QWEN_RUN_API_KEY"
_POSITIVE = click.IntRange(min=1)
_OF_THE_MODEL = (
    "device",
    "backend",
    "threads",
    "max_num_seqs",
    "max_queued_requests",
    "prefill_chunk_size",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    "api_keys",
    metavar="KEY",
    multiple=True,
    envvar=_KEY_VARIABLE,
    help="Key that clients must send; repeatable. Other users see a command line: prefer the "
    "variable QWEN_RUN_API_KEY or --api-key-file.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with one key a line, beside those of --api-key.",
)
@click.option("--protect-metrics", is_flag=True, help="Ask for a key at /metrics too.")
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help='Origin whose pages may call the API, or "*"; repeatable. None by default.',
)
@click.option(
    "--served-model-name",
    metavar="NAME",
    help="The model's name in the API.  [default: the bundle's folder name]",
)
@click.option("--no-page", is_flag=True, help="No chat page at /.")
@click.option("--max-num-seqs", type=_POSITIVE, help="Sequences generated at once.")
@click.option("--max-queued-requests", type=_POSITIVE, help="Sequences that may wait for them.")
@click.option("--prefill-chunk-size", type=_POSITIVE, help="Prompt tokens read in one step.")
@click.option(
    "--max-body-bytes",
    type=_POSITIVE,
    help="Largest body of a request.  [default: 4194304]",
)
@click.option("--threads", type=_POSITIVE, help="CPU threads; one per core by default.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where the model runs.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="What runs it.  [default: onnxruntime]",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long running requests may go on after SIGTERM or Ctrl-C.",
)
@click.option(
    "--keep-alive-seconds",
    type=click.IntRange(min=0),
    default=75,
    show_default=True,
    help="How long an idle connection stays open.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Log lines on stderr for people, or one JSON object a line.",
)
@reports(QwenRuntimeError, extra="serve")
def serve(bundle: Path, **options: Any) -> None:
    """Serve BUNDLE over HTTP, in the shapes of OpenAI's API.

    /v1/chat/completions, /v1/completions and /v1/models answer OpenAI's clients; / is a page to
    chat with the model; /health and /metrics are for probes and dashboards. A first SIGTERM or
    Ctrl-C lets running requests end, a second one stops at once.

    \b
    Examples:
      qwen-run serve artifacts/tiny-qwen2-chat
      QWEN_RUN_API_KEY=secret qwen-run serve BUNDLE --host 0.0.0.0 --port 8080 --log-format json
    """
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.server import ServerSettings, create_app
    from qwen_runtime.server.logs import configure_logging
    from qwen_runtime.server.serving import serve as run_server
    from qwen_runtime.server.settings import read_api_keys

    if os.environ.get(_KEY_VARIABLE, "any").strip() == "":
        raise RequestError(
            f"{_KEY_VARIABLE} must hold a key, but it is empty, which would let everybody in; "
            "unset it to ask for no key",
            param="api_keys",
        )
    file = options.pop("api_key_file")
    keys = () if file is None else read_api_keys(file)
    llm_arguments = _given({name: options.pop(name) for name in _OF_THE_MODEL})
    page = not options.pop("no_page")
    options["api_keys"] = (*options["api_keys"], *keys)
    settings = ServerSettings(page=page, **_given(options))
    app = create_app(Bundle.open(bundle), settings, **llm_arguments)
    name = settings.served_model_name or bundle.resolve().name
    configure_logging(settings.log_format)

    def announce(url: str) -> None:
        key = ' -H "Authorization: Bearer $QWEN_RUN_API_KEY"' if settings.api_keys else ""
        click.echo(f"{name} is served at {url}; Ctrl-C stops it. Try:", err=True)
        question = {"role": "user", "content": "What is 17 + 25?"}
        body = shlex.quote(json.dumps({"model": name, "messages": [question]}))
        click.echo(
            f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {body}",
            err=True,
        )

    run_server(app, settings, on_ready=announce)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the others keep their defaults, which stand elsewhere."""
    return {name: value for name, value in options.items() if value is not None}
