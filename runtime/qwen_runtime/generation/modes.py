"""From the arguments of one call to its state machines: which mode, with which settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.generation.assisted import AssistedDecoding
from qwen_runtime.generation.base import Decoding, IntArray
from qwen_runtime.generation.beam import BeamDecoding
from qwen_runtime.generation.candidates import DraftSettings
from qwen_runtime.generation.guidance import Guidance, GuidedDecoding, negative_prompts
from qwen_runtime.generation.prompts import PromptBatch, checked_ids
from qwen_runtime.generation.rows import Generation, TokenStreamer
from qwen_runtime.generation.sample import SampleDecoding
from qwen_runtime.generation.stopping import StoppingCriterion
from qwen_runtime.generation_config import (
    GenerationConfig,
    GenerationConfigWarning,
    ResolvedConfig,
    resolve,
)
from qwen_runtime.generation_fields import DEFAULTS
from qwen_runtime.manifest import Manifest
from qwen_runtime.sampling import ProcessorCallable
from qwen_runtime.structured import GrammarCompiler, structured_output_processor
from qwen_runtime.text import Tokenizer

__all__ = ["Call", "Draft", "Machine", "Modes", "draft_settings"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model as a call names it."""

    settings: DraftSettings
    on_draft_length: Callable[[int], None] | None
    """Called at the end with the draft length, where the schedule remembers it."""


def draft_settings(config: GenerationConfig, max_context: int) -> DraftSettings:
    """How a draft wants to be used: its own settings, then the defaults."""

    def setting(name: str) -> Any:
        value = getattr(config, name)
        return DEFAULTS[name] if value is None else value

    return DraftSettings(
        num_assistant_tokens=setting("num_assistant_tokens"),
        num_assistant_tokens_schedule=setting("num_assistant_tokens_schedule"),
        assistant_confidence_threshold=setting("assistant_confidence_threshold"),
        max_context=max_context,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call that every prompt of it shares.

    Raises:
        RequestError: If one has a wrong type.
    """

    generation_config: GenerationConfig | None
    defaults: GenerationConfig
    """The bundle's settings."""
    kwargs: Mapping[str, Any]
    logits_processor: Sequence[ProcessorCallable] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    prefix_allowed_tokens_fn: Callable[[int, IntArray], Iterable[int]] | None = None
    streamer: TokenStreamer | None = None
    draft: Draft | None = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.generation_config, GenerationConfig | None):
            raise RequestError(
                "generation_config must be a GenerationConfig, got "
                f"{type(self.generation_config).__name__}; make one with "
                "GenerationConfig.from_dict",
                param="generation_config",
            )
        allowed, streamer = self.prefix_allowed_tokens_fn, self.streamer
        if allowed is not None and not callable(allowed):
            raise RequestError(
                f"prefix_allowed_tokens_fn must be callable, got {type(allowed).__name__}",
                param="prefix_allowed_tokens_fn",
            )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise RequestError(
                f"a streamer must have put and end, got {type(streamer).__name__}",
                param="streamer",
            )
        for name in ("logits_processor", "stopping_criteria"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                raise RequestError(
                    f"{name} must be a list of callables, got {type(value).__name__}", param=name
                )
            object.__setattr__(self, name, tuple(value or ()))
        if self.negative_prompt_attention_mask is not None and self.negative_prompt_ids is None:
            raise RequestError(
                "negative_prompt_attention_mask belongs to negative_prompt_ids; pass both",
                param="negative_prompt_attention_mask",
            )


@dataclass(frozen=True, slots=True)
class Machine:
    """A state machine, ready to be submitted."""

    generation: Generation
    """What is generated."""
    decoding: Decoding
    """What is run: the same, or with what accompanies it."""
    drafts: bool
    """Whether it needs the call's draft model."""


class Modes:
    """Settles settings and creates state machines.

    Args:
        manifest: The bundle's.
        tokenizer: None for a bundle of token ids.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._vocab_size = manifest.model.vocab_size
        self._grammars = (
            None if tokenizer is None else GrammarCompiler(tokenizer, self._vocab_size)
        )

    def for_prompts(self, prompts: Sequence[Sequence[int]], call: Call) -> list[Machine]:
        """A machine for every prompt, given as ids."""
        negative = self._negative_prompts(call)
        if negative and len(negative) != len(prompts):
            raise _wrong_number_of_negatives(len(negative), len(prompts))
        return [
            self._for_prompt(ids, call, index, negative[index : index + 1])
            for index, ids in enumerate(prompts)
        ]

    def for_batch(self, array: npt.ArrayLike, mask: npt.ArrayLike | None, call: Call) -> Machine:
        """One machine for prompts [rows, length] with padding where ``mask`` is 0."""
        ids = checked_ids(array, self._vocab_size, ndim=2)
        config = self._resolve(call, ids.shape[1])
        prompts = PromptBatch.padded(
            ids,
            mask,
            self._vocab_size,
            pad_token_id=config.explicit_pad_token_id,
            eos_token_ids=config.eos_token_ids,
        )
        negative = self._negative_prompts(call)
        return self._machine(prompts, config, call, call.prefix_allowed_tokens_fn, negative)

    def bos_prompt(self, call: Call) -> list[int]:
        """The prompt of a call without one.

        Raises:
            RequestError: If there is no bos token.
        """
        config = self._resolve(call, 1)
        if config.bos_token_id is None:
            raise RequestError(
                "generate needs a prompt, or a bos_token_id to begin with; got neither",
                param="prompt",
            )
        return [config.bos_token_id]

    def _for_prompt(
        self, ids: Sequence[int], call: Call, index: int, negative: tuple[IntArray, ...]
    ) -> Machine:
        prompts = PromptBatch.single(ids, self._vocab_size)
        allowed = call.prefix_allowed_tokens_fn
        if allowed is not None and index:
            first = allowed

            def allowed(row: int, ids: IntArray) -> Iterable[int]:
                return first(index + row, ids)

        return self._machine(prompts, self._resolve(call, len(ids)), call, allowed, negative)

    def _machine(
        self,
        prompts: PromptBatch,
        config: ResolvedConfig,
        call: Call,
        allowed: Callable[[int, IntArray], Iterable[int]] | None,
        negative: tuple[IntArray, ...],
    ) -> Machine:
        prompts.require_room(config.max_new_tokens, self._manifest.max_context)
        _check_combination(config, call)
        arguments: dict[str, Any] = {
            "tokenizer": self._tokenizer,
            "logits_processor": call.logits_processor,
            "stopping_criteria": call.stopping_criteria,
            "prefix_allowed_tokens_fn": allowed,
            "structured": self._structured(config),
            "streamer": call.streamer,
        }
        lookup = config.prompt_lookup_num_tokens is not None
        if config.num_beams == 1 and (lookup or call.draft is not None):
            draft = call.draft
            assisted = AssistedDecoding(
                prompts,
                config,
                vocab_size=self._vocab_size,
                draft=None if draft is None else draft.settings,
                on_draft_length=None if draft is None else draft.on_draft_length,
                **arguments,
            )
            return Machine(assisted, assisted, drafts=draft is not None)
        kind = BeamDecoding if config.num_beams > 1 else SampleDecoding
        if config.guidance_scale == 1:
            plain = kind(prompts, config, **arguments)
            return Machine(plain, plain, drafts=False)
        guidance = Guidance(self._unconditional(prompts, config, negative))
        guided = kind(prompts, config, guidance=guidance, **arguments)
        return Machine(guided, GuidedDecoding(guided, guidance), drafts=False)

    def _structured(self, config: ResolvedConfig) -> ProcessorCallable | None:
        """The mask of a structured output; None for free text."""
        if config.response_format is None:
            return None
        if self._grammars is None:
            raise RequestError(
                "response_format needs a tokenizer, but this bundle has none; leave it out",
                param="response_format",
            )
        grammar = self._grammars.compile(config.response_format)
        return None if grammar is None else structured_output_processor(grammar, config)

    def _unconditional(
        self, prompts: PromptBatch, config: ResolvedConfig, negative: tuple[IntArray, ...]
    ) -> Sequence[IntArray]:
        """Where the unconditional branch of every row begins: by default at its last token."""
        copies = config.num_beams if config.num_beams > 1 else config.num_return_sequences
        num_prompts = len(prompts.tokens)
        if not negative:
            last = prompts.input_ids[:, -1:]
            return tuple(last.repeat(copies, axis=0))
        try:
            PromptBatch(prompts.input_ids, negative).require_room(
                config.max_new_tokens, self._manifest.max_context
            )
        except CapacityError as error:
            raise CapacityError(
                f"negative_prompt_ids: {error}", param="negative_prompt_ids"
            ) from error
        if len(negative) == num_prompts:
            return [row for row in negative for _ in range(copies)]
        if len(negative) == num_prompts * copies:
            return negative
        raise _wrong_number_of_negatives(len(negative), num_prompts)

    def _negative_prompts(self, call: Call) -> tuple[IntArray, ...]:
        if call.negative_prompt_ids is None:
            return ()
        return negative_prompts(
            call.negative_prompt_ids, call.negative_prompt_attention_mask, self._vocab_size
        )

    def _resolve(self, call: Call, prompt_length: int) -> ResolvedConfig:
        return resolve(
            call.generation_config,
            call.defaults,
            call.kwargs,
            prompt_length=prompt_length,
            vocab_size=self._vocab_size,
            max_position_embeddings=min(
                self._manifest.model.max_position_embeddings, self._manifest.max_context
            ),
            has_tokenizer=self._tokenizer is not None,
        )


_OF_THE_DRAFT = (
    "assistant_confidence_threshold",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
)


def _check_combination(config: ResolvedConfig, call: Call) -> None:
    """Refuse modes that exclude each other; warn of what has no effect."""
    lookup = config.prompt_lookup_num_tokens is not None
    if lookup and call.draft is not None:
        raise RequestError(
            "assistant_model and prompt_lookup_num_tokens exclude each other; pass one",
            param="assistant_model",
        )
    if config.num_beams > 1 and call.draft is not None:
        _warn("assistant_model has no effect in beam search; leave one of them out")
    elif config.guidance_scale != 1 and (lookup or call.draft is not None):
        raise RequestError(
            f"guidance_scale={config.guidance_scale} does not work in assisted generation; leave "
            "out assistant_model and prompt_lookup_num_tokens",
            param="guidance_scale",
        )
    if config.guidance_scale == 1 and call.negative_prompt_ids is not None:
        _warn("negative_prompt_ids has no effect without guidance; set guidance_scale")
    argument = call.generation_config or GenerationConfig()
    given = [
        name
        for name in _OF_THE_DRAFT
        if call.kwargs.get(name) is not None or getattr(argument, name) is not None
    ]
    if given:
        _warn(
            f"{', '.join(given)} are read from the draft's settings, not from the call's; set "
            "them in assistant_model.generation_config"
        )
    if config.assistant_ensemble_weight is not None and call.draft is None:
        _warn("assistant_ensemble_weight has no effect without assistant_model")


def _warn(message: str) -> None:
    warnings.warn(message, GenerationConfigWarning, stacklevel=6)


def _wrong_number_of_negatives(given: int, prompts: int) -> RequestError:
    return RequestError(
        f"negative_prompt_ids must have one row per prompt ({prompts}), got {given}",
        param="negative_prompt_ids",
    )
