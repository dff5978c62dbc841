"""How a request is decoded: transformers' settings under transformers' names, and ours.

`GenerationConfig` is what a caller or a bundle sets; `resolve` applies transformers' precedence,
defaults and checks and gives the engine a `ResolvedConfig`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from qwen_runtime.errors import BundleError, RequestError
from qwen_runtime.generation_checks import GenerationConfigWarning, check_irrelevant, normalize
from qwen_runtime.generation_fields import (
    DEFAULTS,
    GENERATE_ARGUMENTS,
    IRRELEVANT,
    OUT_OF_SCOPE,
    WITHOUT_EFFECT,
    refuse_names,
)
from qwen_runtime.generation_resolve import check_resolved, complete, warn_resolved
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling.bias import SequenceBias

if TYPE_CHECKING:  # structured output needs these settings
    from qwen_runtime.structured import ResponseFormat

__all__ = [
    "MODES_NOT_HERE",
    "GenerationConfig",
    "GenerationConfigWarning",
    "ResolvedConfig",
    "resolve",
]

MODES_NOT_HERE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "assistant_lookbehind": "a draft with another tokenizer",
        "target_lookbehind": "a draft with another tokenizer",
    }
)
"""Settings that :func:`resolve` refuses because the engine has no such mode, and the mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Settings of a request; None leaves a setting to the bundle and then to the default.

    Values are checked and lists become tuples. docs/generation.md compares every setting with
    transformers'.

    Raises:
        RequestError: If a value has a wrong type or can never be valid.
    """

    max_length: int | None = None
    """Total length, prompt and padding included; 20 new tokens without any limit."""
    max_new_tokens: int | None = None
    """Tokens to generate at most, >= 1; wins over max_length."""
    min_length: int | None = None
    """No end token below this total length."""
    min_new_tokens: int | None = None
    """No end token before this many new ones; wins over min_length."""
    max_time: float | None = None
    """Seconds after which generation stops; 0 gives one token."""
    stop_strings: str | Sequence[str] | None = None
    """Stop at the token that completes one of these; the text keeps it."""
    stop: str | Sequence[str] | None = None
    """Stop before one of these; the text is trimmed (OpenAI's meaning)."""
    eos_token_id: int | Sequence[int] | None = None
    """End token or tokens."""
    pad_token_id: int | None = None
    """Fills finished rows of a batch; the first end token by default."""
    bos_token_id: int | None = None
    """The prompt where none is given."""

    do_sample: bool | None = None
    """Draw tokens instead of taking the most likely one."""
    num_return_sequences: int | None = None
    """Outputs per prompt; more than 1 needs sampling or beams."""
    seed: int | None = None
    """Makes sampling reproducible, in [0, 2**64); None draws one."""
    rng: Literal["default", "torch"] | None = None
    """Generator: the fast one, or that of torch on CPU."""
    num_beams: int | None = None
    """Beams of a beam search; 1 is none."""
    early_stopping: bool | Literal["never"] | None = None
    """When a beam search ends: see docs/generation.md."""
    length_penalty: float | None = None
    """Exponent of the length that divides a beam's score."""

    temperature: float | None = None
    """Divides the scores, > 0; 1.0 is off."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 is off, 50 the default."""
    top_p: float | None = None
    """Keep the most likely tokens of this mass; 1.0 is off."""
    min_p: float | None = None
    """Keep tokens this fraction as likely as the best, in [0, 1]."""
    top_h: float | None = None
    """Keep the best tokens within this share of the entropy, in (0, 1]."""
    typical_p: float | None = None
    """Keep the most typical tokens of this mass, > 0; 1.0 is off."""
    epsilon_cutoff: float | None = None
    """Keep tokens of at least this probability; 0.0 is off."""
    eta_cutoff: float | None = None
    """Keep tokens above a cut that falls with the entropy; 0.0 is off."""

    repetition_penalty: float | None = None
    """Penalty on tokens of prompt and output, > 0; 1.0 is off."""
    encoder_repetition_penalty: float | None = None
    """Reward of tokens of the prompt, > 0; 1.0 is off."""
    presence_penalty: float | None = None
    """Subtracted from tokens already generated, in [-2, 2] (OpenAI's meaning)."""
    frequency_penalty: float | None = None
    """Subtracted per occurrence in the output, in [-2, 2] (OpenAI's meaning)."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size twice; 0 is off."""
    encoder_no_repeat_ngram_size: int | None = None
    """No n-gram of this size of the prompt in the output; 0 is off."""
    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Token sequences that must not be generated."""
    sequence_bias: SequenceBias | None = None
    """Bias by token sequence, added to its last token."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    """Bias by token id (OpenAI's meaning)."""
    suppress_tokens: Sequence[int] | None = None
    """Tokens that are never generated."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that are not generated first."""
    forced_bos_token_id: int | None = None
    """Forced as the second token of a sequence that starts with one."""
    forced_eos_token_id: int | Sequence[int] | None = None
    """Forced as the last token before max_length."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): raise the end tokens after ``start`` new ones."""
    remove_invalid_values: bool | None = None
    """Replace nan and infinite scores."""
    renormalize_logits: bool | None = None
    """Normalise the processed scores to log-probabilities."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off."""
    response_format: Mapping[str, object] | ResponseFormat | None = None
    """Structured output: see docs/structured-output.md."""

    prompt_lookup_num_tokens: int | None = None
    """Draft this many tokens by looking them up in the prompt."""
    max_matching_ngram_size: int | None = None
    """Longest n-gram matched by prompt lookup; 2 by default."""
    num_assistant_tokens: int | None = None
    """Tokens drafted per round; read from the draft's settings."""
    num_assistant_tokens_schedule: str | None = None
    """"constant", "heuristic" or "heuristic_transient"."""
    assistant_confidence_threshold: float | None = None
    """Drafting ends below this probability."""
    assistant_lookbehind: int | None = None
    """Draft tokens re-encoded to align two tokenizers."""
    target_lookbehind: int | None = None
    """Target tokens re-encoded to align two tokenizers."""
    assistant_ensemble_weight: float | None = None
    """Weight of the target in the accepted mixture, in (0, 1); None is exact."""

    return_dict_in_generate: bool | None = None
    """transformers' switch for the outputs below."""
    output_scores: bool | None = None
    """Return the processed scores of every step."""
    output_logits: bool | None = None
    """Return the model's logits of every step."""
    logprobs: bool | None = None
    """Return the log-probability of every generated token."""
    top_logprobs: int | None = None
    """Return this many alternatives with it; needs logprobs."""

    def __post_init__(self) -> None:
        for name in _FIELDS:
            object.__setattr__(self, name, normalize(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, object]) -> GenerationConfig:
        """Create from settings by name.

        Args:
            settings: Names of this class; settings of transformers that cannot change the
                tokens are accepted with a warning.

        Raises:
            RequestError: Naming a setting that is unknown (with the nearest known name), out of
                scope (with what to do instead), or has a wrong value.
        """
        known: dict[str, Any] = _known_settings(settings)
        return cls(**known)

    @classmethod
    def from_file(cls, path: str | Path) -> GenerationConfig:
        """Read a ``generation_config.json``.

        As in transformers, names that are no settings at all are ignored.

        Args:
            path: The file.

        Raises:
            BundleError: If it cannot be read, or sets something out of scope or invalid.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{path}: expected a readable JSON file, got {error}", path=path
            ) from error
        if not isinstance(content, dict):
            raise BundleError(
                f"{path}: expected a JSON object, got {type(content).__name__}", path=path
            )
        # Inner states were never an output here; transformers' own files carry the two flags.
        outputs = {"output_attentions", "output_hidden_states"}
        meant = (_FIELDS | OUT_OF_SCOPE.keys() | GENERATE_ARGUMENTS.keys()) - outputs
        try:
            return cls.from_dict({name: v for name, v in content.items() if name in meant})
        except RequestError as error:
            raise BundleError(f"{path}: {error}", path=path) from error


_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(GenerationConfig))


def _known_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Refuse foreign names; warn where a name of transformers has no effect."""
    known = refuse_names(settings, _FIELDS)
    for name in settings.keys() & IRRELEVANT.keys():
        check_irrelevant(name, settings[name])
        if settings[name] is not None and name in WITHOUT_EFFECT:
            warnings.warn(
                f"{name} has no effect: {IRRELEVANT[name]}", GenerationConfigWarning, stacklevel=4
            )
    return known


def resolve(
    argument: GenerationConfig | None,
    model_defaults: GenerationConfig,
    kwargs: Mapping[str, object],
    *,
    prompt_length: int,
    vocab_size: int,
    max_position_embeddings: int | None = None,
    has_tokenizer: bool = True,
) -> ResolvedConfig:
    """Settle the settings of one request, with transformers' precedence.

    A keyword wins over the argument, the argument over the bundle's settings, those over the
    default. None in ``kwargs`` switches a setting off; None in a configuration leaves it open.

    Args:
        argument: What the caller passed as ``generation_config``.
        model_defaults: The bundle's ``generation_config.json``.
        kwargs: What the caller passed by keyword.
        prompt_length: Tokens of the prompt, padding included.
        vocab_size: Number of logits; token ids must be below it.
        max_position_embeddings: Caps the length nobody asked for; None does not.
        has_tokenizer: Whether text can be encoded, as stop strings need.

    Returns:
        The settings, complete and checked.

    Raises:
        RequestError: Naming a setting that is unknown, out of scope, wrong, at odds with
            another, or that needs a mode the engine does not have (:data:`MODES_NOT_HERE`).

    Warns:
        GenerationConfigWarning: If a setting has no effect, or not the one that seems intended.
    """
    given = {name: normalize(name, v) for name, v in _known_settings(kwargs).items()}
    argument = argument or GenerationConfig()
    merged: dict[str, Any] = {}
    for name in _FIELDS:
        layers = (getattr(argument, name), getattr(model_defaults, name), DEFAULTS.get(name))
        configured = next((value for value in layers if value is not None), None)
        merged[name] = given.get(name, configured)
    explicit = {n for n in _FIELDS if given.get(n, getattr(argument, n)) is not None}
    _refuse_modes(merged, explicit)
    resolved = complete(
        merged,
        default_max_length=merged["max_length"] is None
        or ("max_length" not in explicit and model_defaults.max_length is None),
        default_min_length="min_length" not in explicit and model_defaults.min_length is None,
        prompt_length=prompt_length,
        max_position_embeddings=max_position_embeddings,
    )
    check_resolved(resolved, vocab_size=vocab_size, has_tokenizer=has_tokenizer)
    warn_resolved(resolved, explicit)
    return resolved


def _refuse_modes(merged: Mapping[str, object], explicit: set[str]) -> None:
    for name, mode in MODES_NOT_HERE.items():
        value = merged[name]
        inert = value is None or value == DEFAULTS.get(name)
        if not inert and name in explicit:
            raise RequestError(
                f"{name}={value!r} needs {mode}, which this version does not have; leave it out",
                param=name,
            )
