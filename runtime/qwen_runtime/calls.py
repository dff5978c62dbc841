"""From the arguments of `LLM.generate` and `LLM.stream` to requests for the engine."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.engine import Model, Request
from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.generation.base import IntArray
from qwen_runtime.generation.candidates import require_same_vocabulary
from qwen_runtime.generation.modes import Call, Draft, Machine, draft_settings
from qwen_runtime.generation.rows import TokenStreamer
from qwen_runtime.generation.stopping import StoppingCriterion
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.results import batch_output, request_outputs
from qwen_runtime.sampling import ProcessorCallable

if TYPE_CHECKING:  # it prepares its calls here
    from qwen_runtime.llm import LLM

__all__ = ["PreparedCall", "prepare_generation", "prepare_stream"]


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call whose arguments were checked: state machines, and what becomes of them."""

    machines: Sequence[Machine]
    """One for every prompt, or one for an array; of a stream, one."""
    draft: Model | None
    """The model that they draft with."""
    cancel: threading.Event | None
    """The caller's."""
    num_negative: int
    """Tokens of the longest negative prompt; 0 without."""
    collect: Callable[[], Any]
    """What the call returns, once all requests are done."""

    def requests(
        self,
        *,
        on_step: Callable[[], None] | None = None,
        on_done: Callable[[Request], None] | None = None,
        background: bool = False,
    ) -> list[Request]:
        """New requests for the engine; see `Request`."""
        return [
            Request(
                machine.decoding,
                on_step,
                draft=self.draft if machine.drafts else None,
                on_done=on_done,
                cancel=self.cancel,
                background=background,
                num_tokens=machine.generation.config.max_length + self.num_negative,
                rows=partial(getattr, machine.generation, "rows"),
            )
            for machine in self.machines
        ]

    def name_setting(self, error: CapacityError) -> None:
        """Let an error about too many rows name the setting that makes several of a prompt."""
        names = ("num_beams", "num_return_sequences")
        config = self.machines[0].generation.config
        if error.param is None:
            error.param = next((n for n in names if getattr(config, n) > 1), None)


def prepare_generation(
    llm: LLM,
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
) -> PreparedCall:
    """Check the arguments of `LLM.generate`, which see.

    Raises:
        RequestError: If an argument is wrong or unknown; it names it.
        CapacityError: If prompt and new tokens do not fit.
    """
    _check_cancel(cancel)
    call = Call(
        generation_config=generation_config,
        defaults=llm.generation_config,
        kwargs=kwargs,
        draft=_draft(llm, assistant_model),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        streamer=streamer,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
    )
    lent = _lent(assistant_model)
    array = _array_form(prompt, input_ids, attention_mask)
    if array is not None:
        llm._inputs.refuse_template_arguments("an array", tools, chat_template_kwargs)
        machine = llm._modes.for_batch(array, attention_mask, call)

        def batch() -> Any:
            return batch_output(machine.generation, llm.tokenizer)

        return PreparedCall([machine], lent, cancel, _longest(negative_prompt_ids), batch)
    prompts, many = llm._inputs.read(
        prompt, tools=tools, template_kwargs=chat_template_kwargs or {}
    )
    if prompt is None:
        llm._inputs.refuse_template_arguments("no prompt", tools, chat_template_kwargs)
        prompts = [llm._modes.bos_prompt(call)]
    if streamer is not None and len(prompts) > 1:
        raise RequestError(
            f"a streamer follows one prompt, got a list of {len(prompts)}; stream each by itself",
            param="streamer",
        )
    machines = llm._modes.for_prompts(prompts, call)

    def outputs() -> Any:
        made = [
            output
            for machine in machines
            for output in request_outputs(machine.generation, llm.tokenizer)
        ]
        return made if many or len(made) > 1 else made[0]

    return PreparedCall(machines, lent, cancel, _longest(negative_prompt_ids), outputs)


def prepare_stream(
    llm: LLM,
    prompt: Any,
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
) -> PreparedCall:
    """Check the arguments of `LLM.stream`, which see; errors as in `prepare_generation`."""
    prompts, many = llm._inputs.read(
        prompt, tools=tools, template_kwargs=chat_template_kwargs or {}
    )
    if many or not prompts:
        raise RequestError(
            f"stream takes one prompt, got {len(prompts) or None}; stream each by itself",
            param="prompt",
        )
    call = Call(
        generation_config=generation_config,
        defaults=llm.generation_config,
        kwargs=kwargs,
        draft=_draft(llm, assistant_model),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
    )
    machine = llm._modes.for_prompts(prompts, call)[0]
    for name in ("num_beams", "num_return_sequences"):
        number = getattr(machine.generation.config, name)
        if number > 1:
            raise RequestError(
                f"stream gives one sequence as it grows, got {name}={number}; use generate",
                param=name,
            )
    _check_cancel(cancel)
    return PreparedCall(
        [machine],
        _lent(assistant_model),
        cancel,
        _longest(negative_prompt_ids),
        lambda: request_outputs(machine.generation, llm.tokenizer)[0],
    )


def _draft(llm: LLM, assistant: LLM | None) -> Draft | None:
    if assistant is None:
        return None
    if not isinstance(assistant, type(llm)):
        raise RequestError(
            f"assistant_model must be an LLM, got {type(assistant).__name__}; open the draft's "
            "bundle first",
            param="assistant_model",
        )
    if assistant not in llm._known_drafts:
        ours, theirs = (of.bundle.manifest.model.vocab_size for of in (llm, assistant))
        require_same_vocabulary(ours, theirs, llm.tokenizer, assistant.tokenizer)
        llm._known_drafts.add(assistant)
    settings = draft_settings(assistant.generation_config, assistant._max_context)

    def remember(length: int) -> None:
        assistant.generation_config = dataclasses.replace(
            assistant.generation_config, num_assistant_tokens=length
        )

    heuristic = settings.num_assistant_tokens_schedule == "heuristic"
    return Draft(settings, remember if heuristic else None)


def _lent(assistant: LLM | None) -> Model | None:
    return None if assistant is None else assistant._engine.model


def _longest(negative: Any) -> int:
    """Tokens of the longest negative prompt, given as ids or as rows of ids; they were checked."""
    if negative is None or not len(negative):
        return 0
    return len(negative) if np.ndim(negative[0]) == 0 else max(len(row) for row in negative)


def _check_cancel(cancel: object) -> None:
    if cancel is not None and not isinstance(cancel, threading.Event):
        raise RequestError(
            f"cancel must be a threading.Event, got {type(cancel).__name__}", param="cancel"
        )


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
