"""The settings of one request after precedence, defaults and checks: nothing left to decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # structured output needs these settings
    from qwen_runtime.structured import ResponseFormat

__all__ = ["ResolvedConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """What :func:`qwen_runtime.generation_config.resolve` returns.

    Fields mean what they mean in :class:`qwen_runtime.generation_config.GenerationConfig`; here
    defaults are filled in and a setting that is switched off has its neutral value.
    """

    prompt_length: int
    """Tokens of the prompt, padding included."""
    max_length: int
    """Length at which the sequence ends, prompt and padding included; > prompt_length."""
    max_new_tokens: int
    """Most tokens to generate: max_length - prompt_length, >= 1."""
    min_length: int
    """End tokens are banned below this length; 0 is off."""
    min_new_tokens: int
    """End tokens are banned until this many are generated; 0 is off."""
    max_time: float | None
    """Seconds after which all rows stop, checked after each token."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a row; empty where nothing does."""
    pad_token_id: int | None
    """Fills finished rows; the first end token where none is set, None without both."""
    explicit_pad_token_id: int | None
    """The pad token as set, before that rule; mask inference and beam search look at it."""
    bos_token_id: int | None
    """Prompt of a request without one."""
    stop_strings: tuple[str, ...]
    """End the text at the token that completes one; the text keeps it."""
    stop: tuple[str, ...]
    """End the text before one; the text is trimmed."""

    do_sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | Literal["never"]
    length_penalty: float
    seed: int | None
    rng: Literal["default", "torch"]

    temperature: float
    """1.0 is off."""
    top_k: int
    """0 is off."""
    top_p: float
    """>= 1.0 is off."""
    min_p: float | None
    top_h: float | None
    typical_p: float
    """>= 1.0 is off."""
    epsilon_cutoff: float
    """Off outside (0, 1)."""
    eta_cutoff: float
    """Off outside (0, 1)."""

    repetition_penalty: float
    """1.0 is off."""
    encoder_repetition_penalty: float
    """1.0 is off."""
    presence_penalty: float
    """0.0 is off."""
    frequency_penalty: float
    """0.0 is off."""
    no_repeat_ngram_size: int
    """<= 0 is off."""
    encoder_no_repeat_ngram_size: int
    """<= 0 is off."""
    bad_words_ids: tuple[tuple[int, ...], ...] | None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None
    logit_bias: tuple[tuple[int, float], ...] | None
    suppress_tokens: tuple[int, ...] | None
    begin_suppress_tokens: tuple[int, ...] | None
    forced_bos_token_id: int | None
    forced_eos_token_ids: tuple[int, ...] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool
    renormalize_logits: bool
    guidance_scale: float
    """1 is off."""

    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    num_assistant_tokens: int
    num_assistant_tokens_schedule: str
    assistant_confidence_threshold: float
    assistant_lookbehind: int
    target_lookbehind: int
    assistant_ensemble_weight: float | None
    response_format: Mapping[str, object] | ResponseFormat | None

    return_dict_in_generate: bool
    output_scores: bool
    """Already False where return_dict_in_generate is."""
    output_logits: bool
    """Already False where return_dict_in_generate is."""
    logprobs: bool
    top_logprobs: int

    @property
    def needs_scores(self) -> bool:
        """Whether an output needs the processed scores of every step."""
        return self.output_scores or self.logprobs
