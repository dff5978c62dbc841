"""Run Qwen bundles in plain Python and NumPy: no torch, no transformers.

    from qwen_runtime import LLM

    llm = LLM("artifacts/tiny-qwen2-chat")
    print(llm.generate([{"role": "user", "content": "What is 17 + 25?"}]).text)

Names are loaded when they are first used, so that the command line answers ``--help`` at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_runtime.async_llm import AsyncLLM
    from qwen_runtime.async_stream import AsyncTextStream
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.engine.stats import EngineStats
    from qwen_runtime.errors import (
        BackendError,
        BundleError,
        CapacityError,
        EngineClosedError,
        QueueFullError,
        QwenRuntimeError,
        RequestError,
    )
    from qwen_runtime.generation.candidates import AssistedStatistics
    from qwen_runtime.generation_config import GenerationConfig
    from qwen_runtime.llm import LLM
    from qwen_runtime.outputs import BatchOutput, RequestOutput, TokenLogprob
    from qwen_runtime.streaming import StreamChunk, TextStream
    from qwen_runtime.text import TextIteratorStreamer, TextStreamer

__all__ = [
    "LLM",
    "AssistedStatistics",
    "AsyncLLM",
    "AsyncTextStream",
    "BackendError",
    "BatchOutput",
    "Bundle",
    "BundleError",
    "CapacityError",
    "EngineClosedError",
    "EngineStats",
    "GenerationConfig",
    "QueueFullError",
    "QwenRuntimeError",
    "RequestError",
    "RequestOutput",
    "StreamChunk",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "TokenLogprob",
]

_MODULES = {
    "LLM": "llm",
    "AssistedStatistics": "generation.candidates",
    "AsyncLLM": "async_llm",
    "AsyncTextStream": "async_stream",
    "EngineStats": "engine.stats",
    "Bundle": "bundle",
    "GenerationConfig": "generation_config",
    "BatchOutput": "outputs",
    "RequestOutput": "outputs",
    "TokenLogprob": "outputs",
    "StreamChunk": "streaming",
    "TextStream": "streaming",
    "TextIteratorStreamer": "text",
    "TextStreamer": "text",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'qwen_runtime' has no attribute {name!r}")
    value = getattr(import_module(f"qwen_runtime.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
