"""`LLM`: a bundle that generates."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.registry import DEVICES, check_backend, open_runner
from qwen_runtime.bundle import Bundle
from qwen_runtime.calls import prepare_generation, prepare_stream
from qwen_runtime.engine import KEPT_SLOTS, EngineDriver, EngineLimits, EngineStats
from qwen_runtime.engine.limits import (
    IDLE_CHUNK_SIZE,
    MAX_NUM_SEQS,
    MAX_QUEUED_REQUESTS,
    PREFILL_CHUNK_SIZE,
)
from qwen_runtime.errors import CapacityError, QueueFullError, RequestError
from qwen_runtime.generation.base import IntArray
from qwen_runtime.generation.modes import Modes
from qwen_runtime.generation.rows import TokenStreamer
from qwen_runtime.generation.stopping import StoppingCriterion
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.inputs import Message, PromptReader
from qwen_runtime.manifest import Manifest
from qwen_runtime.memory import available_bytes
from qwen_runtime.outputs import BatchOutput
from qwen_runtime.sampling import ProcessorCallable
from qwen_runtime.streaming import TextStream
from qwen_runtime.text import ChatTemplate, Tokenizer

__all__ = ["LLM", "Prompt"]

Prompt = str | Sequence[int] | Sequence[Message]


class LLM:
    """Loads a bundle and generates with it.

    Safe to use from several threads: their requests share the engine's steps.

    Args:
        bundle: The bundle's folder, or an opened bundle.
        device: "cpu" or "cuda" for "onnxruntime", "cuda" for "tensorrt"; None for the backend's
            first. With "cuda" ONNX Runtime runs the bundle's graphs for CUDA, which are proved
            against its reference when they are first loaded on a GPU.
        backend: "onnxruntime", or "tensorrt" for an engine in the bundle, which is proved against
            the bundle's reference when it is first loaded on a GPU.
        threads: Threads for one operator on the CPU; None for one per core.
        prefix_cache_slots: Cache slots that keep their prompts after their requests, so that
            prompts with the same beginning are computed only from there on. Results are the same,
            bit for bit. Each takes the memory of one more running request; 0 keeps none and
            computes every prompt whole.
        max_num_seqs: Rows that run at once; other requests wait, in the order they came in. A
            call of `generate` that needs more rows by itself runs when nothing else does.
        max_queued_requests: Requests that may wait. Further ones are refused with
            `QueueFullError`; the prompts of one call of `generate`, whose caller waits for them,
            are accepted together.
        max_cache_tokens: Tokens that running rows may come to hold, all taken to be as long as the
            longest (prompt and ``max_new_tokens``). None on the CPU: what half of the memory holds
            that is free now; on a GPU: no limit but what the engine can hold.
        prefill_chunk_size: Tokens of prompts that run between two steps of running rows, an even
            number: what rows wait while others' prompts are computed. From 24 rows on the CPU
            takes twice as many, and so on; results are the same there. None takes 32 on the CPU,
            512 on a GPU.

    Raises:
        BundleError: If the folder is no sound bundle.
        BackendError: If the engine is missing or cannot load it.
        RequestError: If device or backend is not one of those named, or a number is no count.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        device: Literal["cpu", "cuda"] | None = None,
        backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime",
        threads: int | None = None,
        prefix_cache_slots: int = KEPT_SLOTS,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        max_cache_tokens: int | None = None,
        prefill_chunk_size: int | None = None,
    ) -> None:
        _check_prefix_cache_slots(prefix_cache_slots)
        check_backend(backend, device, threads)
        on_cpu = (device or DEVICES[backend][0]) == "cpu"
        limits = _limits(
            on_cpu, max_num_seqs, max_queued_requests, max_cache_tokens, prefill_chunk_size
        )
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        self.tokenizer: Tokenizer | None = None
        """The bundle's tokenizer; None for a bundle of token ids."""
        self.chat_template: ChatTemplate | None = None
        """Its chat template; None where it has none."""
        if manifest.tokenizer is not None:
            entry = manifest.tokenizer
            self.tokenizer = Tokenizer(
                self.bundle.file("tokenizer.json"),
                entry.special_tokens,
                split_special_tokens=entry.split_special_tokens,
            )
            if entry.chat_templates:
                templates = {
                    name: self.bundle.file(file).read_text("utf-8")
                    for name, file in entry.chat_templates.items()
                }
                self.chat_template = ChatTemplate(templates, entry.special_tokens)
        self.generation_config = GenerationConfig.from_file(
            self.bundle.file("generation_config.json")
        )
        """The bundle's settings, used where a request names none."""
        self._inputs = PromptReader(self.tokenizer, self.chat_template)
        runner = open_runner(self.bundle, backend=backend, device=device, threads=threads)
        # An engine may hold less than the bundle's graphs.
        self._max_context = runner.limits.max_context
        fitting = dataclasses.replace(manifest, max_context=self._max_context)
        self._modes = Modes(fitting, self.tokenizer)
        # Comparing vocabularies takes a while: once for each draft.
        self._known_drafts: weakref.WeakSet[LLM] = weakref.WeakSet()
        if on_cpu and max_cache_tokens is None:
            limits = dataclasses.replace(limits, max_cache_tokens=_affordable_tokens(fitting))
        self._engine = EngineDriver(runner, kept_slots=prefix_cache_slots, limits=limits)

    @overload
    def generate(
        self,
        prompt: npt.NDArray[np.integer[Any]],
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> BatchOutput: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any: ...

    def generate(
        self,
        prompt: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: npt.ArrayLike | None = None,
        attention_mask: npt.ArrayLike | None = None,
        logits_processor: Sequence[ProcessorCallable] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: Callable[[int, IntArray], Iterable[int]] | None = None,
        streamer: TokenStreamer | None = None,
        assistant_model: LLM | None = None,
        negative_prompt_ids: npt.ArrayLike | Sequence[Sequence[int]] | None = None,
        negative_prompt_attention_mask: npt.ArrayLike | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate.

        Args:
            prompt: Text (verbatim), token ids, messages (through the chat template), a list of
                these, or an int array [rows, length] as transformers takes it.
            generation_config: Settings; keywords win over it, it wins over the bundle's.
            input_ids: The array form by its name in transformers.
            attention_mask: 1 for tokens, 0 for pads, [rows, length]; array form only.
            logits_processor: Called as (ids [rows, length], scores [rows, V]) -> scores, after
                the built-in processors and before the warpers.
            stopping_criteria: Called as (ids [rows, length], scores or None) -> bool(s).
            prefix_allowed_tokens_fn: Called as (index, ids [length]) -> allowed ids.
            streamer: Gets the prompt, then every step's ids.
            assistant_model: A smaller LLM of the same vocabulary that drafts tokens, which this
                one checks several at a time. How much it drafts is in its generation_config.
            negative_prompt_ids: What to steer away from with ``guidance_scale``: ids of every
                prompt; None begins at the prompt's last token.
            negative_prompt_attention_mask: 1 for its tokens, 0 for pads on the left.
            tools: Tools for the chat template; messages only.
            chat_template_kwargs: More variables for the chat template; messages only.
            cancel: Ends generation within one step when another thread sets it; what was
                generated is returned with finish_reason "cancelled".
            **kwargs: Settings of `GenerationConfig` by name.

        Returns:
            One `RequestOutput` for one prompt; a flat list for a list of prompts or for
            ``num_return_sequences`` > 1; a `BatchOutput` for the array form.

        Raises:
            RequestError: If an argument is wrong or unknown; it names it.
            CapacityError: If prompt and new tokens do not fit.
            QueueFullError: If as many requests wait as may.
            BackendError: If the engine fails.
        """
        prepared = prepare_generation(
            self,
            prompt,
            generation_config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=streamer,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            cancel=cancel,
            **kwargs,
        )
        try:
            self._engine.drain(prepared.requests())
        except QueueFullError:
            raise
        except CapacityError as error:
            prepared.name_setting(error)
            raise
        return prepared.collect()

    def stream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: Sequence[ProcessorCallable] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: Callable[[int, IntArray], Iterable[int]] | None = None,
        assistant_model: LLM | None = None,
        negative_prompt_ids: npt.ArrayLike | Sequence[Sequence[int]] | None = None,
        negative_prompt_attention_mask: npt.ArrayLike | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
        **kwargs: Any,
    ) -> TextStream:
        """Generate for one prompt, piece by piece.

        Arguments are those of `generate`. Everything is checked before this returns; the model
        runs while the stream is read. Closing the stream cancels the request.

        Returns:
            An iterator over text pieces: whole characters only, joined they are
            ``stream.output.text``.
        """
        prepared = prepare_stream(
            self,
            prompt,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            cancel=cancel,
            **kwargs,
        )
        (request,) = prepared.requests()
        return TextStream(
            prepared.machines[0].generation,
            self.tokenizer,
            lambda: self._engine.run(request),
            request.cancel,
            self._engine.settle,
        )

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of one prompt, as `generate` would run them.

        Raises:
            RequestError: If it is no single prompt, or the bundle lacks what it needs.
        """
        prompts, many = self._inputs.read(
            prompt, tools=tools, template_kwargs=chat_template_kwargs or {}
        )
        if many or not prompts:
            raise RequestError("encode takes one prompt", param="prompt")
        return prompts[0]

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._max_context

    def stats(self) -> EngineStats:
        """What the engine is at and has done; cheap, from any thread."""
        return self._engine.stats()

    @property
    def alive(self) -> bool:
        """Whether it can generate: it is open, and the thread of background requests has not died."""
        return self._engine.alive

    def close(self) -> None:
        """Release the engine; the object cannot generate afterwards."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_prefix_cache_slots(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise RequestError(
            f"prefix_cache_slots must be an integer >= 0 (0 turns reuse off), got {count!r}",
            param="prefix_cache_slots",
        )


def _limits(
    on_cpu: bool, num_seqs: int, queued: int, tokens: int | None, chunk: int | None
) -> EngineLimits:
    if chunk is None:
        chunk = PREFILL_CHUNK_SIZE if on_cpu else IDLE_CHUNK_SIZE
    limits = EngineLimits(num_seqs, queued, chunk, max_cache_tokens=tokens)
    # On the CPU cuts change no bit; what other kernels do depends on sizes.
    idle = max(IDLE_CHUNK_SIZE, chunk) if on_cpu else chunk
    return dataclasses.replace(limits, idle_chunk_size=idle)


def _affordable_tokens(manifest: Manifest) -> int:
    """Tokens of KV cache in half of the memory that is free: one row of full length at least."""
    model = manifest.model
    values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    token_bytes = values * np.dtype(np.float32).itemsize
    return max(manifest.max_context, available_bytes() // 2 // token_bytes)
