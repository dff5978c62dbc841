"""A server whose answers take their time, for tests that must come in between.

Run as a script it serves a bundle: ``python slow_server.py BUNDLE DRAIN_SECONDS``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import numpy as np

from qwen_runtime import LLM, AsyncLLM, AsyncTextStream
from qwen_runtime.server import ServerSettings, create_app
from qwen_runtime.server.logs import configure_logging
from qwen_runtime.server.serving import serve

NUM_TOKENS = 100
TOKEN_SECONDS = 0.02


class SlowLLM(AsyncLLM):
    """The engine as it is, but every answer has `NUM_TOKENS` and a pause before each."""

    def stream(self, *args: Any, **arguments: Any) -> AsyncTextStream:
        """Stream slowly."""
        processors = [*arguments.pop("logits_processor", ()), _pause]
        lengths = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
        return super().stream(*args, **{**arguments, **lengths}, logits_processor=processors)


def _pause(_: np.ndarray, scores: np.ndarray) -> np.ndarray:
    time.sleep(TOKEN_SECONDS)
    return scores


def main() -> None:
    """Serve; prints the address."""
    bundle, drain_seconds = sys.argv[1:]
    settings = ServerSettings(port=0, drain_seconds=float(drain_seconds))
    configure_logging("json")
    with LLM(bundle, threads=1) as llm:
        app = create_app(SlowLLM(llm), settings)
        serve(app, settings, on_ready=lambda url: click.echo(url))


if __name__ == "__main__":
    main()
