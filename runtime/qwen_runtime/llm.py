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

from qwen_runtime.backends.registry import check_backend, open_runner
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine import KEPT_SLOTS, EngineDriver, Model
from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.generation.base import IntArray
from qwen_runtime.generation.candidates import require_same_vocabulary
from qwen_runtime.generation.modes import Call, Draft, Machine, Modes, draft_settings
from qwen_runtime.generation.rows import TokenStreamer
from qwen_runtime.generation.stopping import StoppingCriterion
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.inputs import Message, PromptReader
from qwen_runtime.outputs import BatchOutput
from qwen_runtime.results import batch_output, request_outputs
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
        device: "cpu" for "onnxruntime", "cuda" for "tensorrt"; None for the backend's own.
        backend: "onnxruntime", or "tensorrt" for an engine in the bundle, which is proved against
            the bundle's reference when it is first loaded on a GPU.
        threads: Threads for one operator on the CPU; None for one per core.
        prefix_cache_slots: Cache slots that keep their prompts after their requests, so that
            prompts with the same beginning are computed only from there on. Results are the same,
            bit for bit. Each takes the memory of one more running request; 0 keeps none and
            computes every prompt whole.

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
    ) -> None:
        _check_prefix_cache_slots(prefix_cache_slots)
        check_backend(backend, device, threads)
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
        self._engine = EngineDriver(runner, kept_slots=prefix_cache_slots)

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
            BackendError: If the engine fails.
        """
        _check_cancel(cancel)
        call = self._call(
            generation_config,
            kwargs,
            assistant_model,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=streamer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        array = _array_form(prompt, input_ids, attention_mask)
        if array is not None:
            self._inputs.refuse_template_arguments("an array", tools, chat_template_kwargs)
            machine = self._modes.for_batch(array, attention_mask, call)
            self._run([machine], assistant_model, cancel)
            return batch_output(machine.generation, self.tokenizer)
        prompts, many = self._inputs.read(
            prompt, tools=tools, template_kwargs=chat_template_kwargs or {}
        )
        if prompt is None:
            self._inputs.refuse_template_arguments("no prompt", tools, chat_template_kwargs)
            prompts = [self._modes.bos_prompt(call)]
        if streamer is not None and len(prompts) > 1:
            raise RequestError(
                f"a streamer follows one prompt, got a list of {len(prompts)}; stream each by "
                "itself",
                param="streamer",
            )
        machines = self._modes.for_prompts(prompts, call)
        self._run(machines, assistant_model, cancel)
        outputs = [
            output
            for machine in machines
            for output in request_outputs(machine.generation, self.tokenizer)
        ]
        return outputs if many or len(outputs) > 1 else outputs[0]

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
        prompts, many = self._inputs.read(
            prompt, tools=tools, template_kwargs=chat_template_kwargs or {}
        )
        if many or not prompts:
            raise RequestError(
                f"stream takes one prompt, got {len(prompts) or None}; stream each by itself",
                param="prompt",
            )
        call = self._call(
            generation_config,
            kwargs,
            assistant_model,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        machine = self._modes.for_prompts(prompts, call)[0]
        for name in ("num_beams", "num_return_sequences"):
            number = getattr(machine.generation.config, name)
            if number > 1:
                raise RequestError(
                    f"stream gives one sequence as it grows, got {name}={number}; use generate",
                    param=name,
                )
        _check_cancel(cancel)
        cancel = cancel or threading.Event()
        return TextStream(
            machine.generation,
            self.tokenizer,
            lambda: self._engine.run(machine.decoding, _lent(machine, assistant_model), cancel),
            cancel,
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

    def _call(
        self,
        generation_config: GenerationConfig | None,
        kwargs: Mapping[str, Any],
        assistant_model: LLM | None,
        **arguments: Any,
    ) -> Call:
        return Call(
            generation_config=generation_config,
            defaults=self.generation_config,
            kwargs=kwargs,
            draft=None if assistant_model is None else self._draft(assistant_model),
            **arguments,
        )

    def _draft(self, assistant: LLM) -> Draft:
        if not isinstance(assistant, LLM):
            raise RequestError(
                f"assistant_model must be an LLM, got {type(assistant).__name__}; open the draft's "
                "bundle first",
                param="assistant_model",
            )
        if assistant not in self._known_drafts:
            ours, theirs = (of.bundle.manifest.model.vocab_size for of in (self, assistant))
            require_same_vocabulary(ours, theirs, self.tokenizer, assistant.tokenizer)
            self._known_drafts.add(assistant)
        settings = draft_settings(assistant.generation_config, assistant._max_context)

        def remember(length: int) -> None:
            assistant.generation_config = dataclasses.replace(
                assistant.generation_config, num_assistant_tokens=length
            )

        heuristic = settings.num_assistant_tokens_schedule == "heuristic"
        return Draft(settings, remember if heuristic else None)

    def _run(
        self, machines: Sequence[Machine], assistant: LLM | None, cancel: threading.Event | None
    ) -> None:
        try:
            self._engine.drain(
                [machine.decoding for machine in machines], _lent(machines[0], assistant), cancel
            )
        except CapacityError as error:
            # Lengths were checked before, so it is about the number of rows.
            if error.param is None:
                error.param = _setting_of_rows(machines[0])
            raise


def _setting_of_rows(machine: Machine) -> str | None:
    """The setting that makes several rows of one prompt."""
    names = ("num_beams", "num_return_sequences")
    return next((n for n in names if getattr(machine.generation.config, n) > 1), None)


def _check_prefix_cache_slots(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise RequestError(
            f"prefix_cache_slots must be an integer >= 0 (0 turns reuse off), got {count!r}",
            param="prefix_cache_slots",
        )


def _check_cancel(cancel: object) -> None:
    if cancel is not None and not isinstance(cancel, threading.Event):
        raise RequestError(
            f"cancel must be a threading.Event, got {type(cancel).__name__}", param="cancel"
        )


def _lent(machine: Machine, assistant: LLM | None) -> Model | None:
    """The model that a state machine drafts with."""
    return assistant._engine.model if assistant is not None and machine.drafts else None


def _array_form(
    prompt: object, input_ids: npt.ArrayLike | None, attention_mask: npt.ArrayLike | None
) -> npt.ArrayLike | None:
    if input_ids is not None:
        if prompt is not None:
            raise RequestError("pass the prompt or input_ids, not both", param="input_ids")
        return input_ids
    if isinstance(prompt, np.ndarray) and prompt.ndim == 2:
        return prompt
    if attention_mask is not None:
        raise RequestError(
            "attention_mask belongs to an array of ids [rows, length]; pass input_ids with it",
            param="attention_mask",
        )
    return None
