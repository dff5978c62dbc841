"""The processors of a request, in transformers' order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.bias import (
    LogitBiasLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from qwen_runtime.sampling.constraints import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from qwen_runtime.sampling.entropy_warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)
from qwen_runtime.sampling.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from qwen_runtime.sampling.ngrams import (
    EncoderNoRepeatNGramLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.penalties import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    FrequencyPenaltyLogitsProcessor,
    PresencePenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from qwen_runtime.sampling.processor import (
    LogitsProcessorList,
    ProcessorCallable,
    check_custom_processor,
)
from qwen_runtime.sampling.warpers import (
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:  # the configuration's checks build warpers from this module
    from qwen_runtime.resolved_config import ResolvedConfig

__all__ = ["build_logits_processors", "build_warpers"]


def build_logits_processors(
    config: ResolvedConfig,
    *,
    prompt_ids: IdArray,
    prompt_ignore_length: Sequence[int] | None = None,
    custom: Sequence[object] = (),
    prefix_allowed_tokens_fn: Callable[[int, IdArray], Iterable[int]] | None = None,
    unconditional_logits: Callable[[IdArray], FloatArray] | None = None,
    structured: ProcessorCallable | None = None,
) -> LogitsProcessorList:
    """Create the processors of one request, or of one padded batch.

    The order is transformers' (5.23). A custom processor of exactly the type of a built-in one
    takes its place; the others come before the warpers. Presence and frequency penalty, which
    transformers does not have, follow the repetition penalty, and ``logit_bias`` follows
    ``sequence_bias``.

    Args:
        config: The settings.
        prompt_ids: The prompts before they are expanded to beams or return sequences,
            [prompts, length], padding included.
        prompt_ignore_length: Leading positions that the repetition penalty skips, one per row
            it will see; None where nothing is padded.
        custom: The caller's processors.
        prefix_allowed_tokens_fn: See :class:`PrefixConstrainedLogitsProcessor`.
        unconditional_logits: See :class:`UnbatchedClassifierFreeGuidanceLogitsProcessor`;
            required where the settings ask for guidance.
        structured: Mask of a structured output. It comes after all that could lead out of the
            grammar and before the warpers, which could leave nothing that it allows.

    Returns:
        The processors; empty where the scores are used as they are.

    Raises:
        RequestError: If a custom processor cannot be called, or guidance lacks its logits.

    Warns:
        UserWarning: If a custom processor replaces a built-in one.
    """
    merged = _merge(
        [
            *_biases(config, unconditional_logits),
            *_repetition(config, prompt_ids, prompt_ignore_length),
            *_constraints(config, prompt_ids, prefix_allowed_tokens_fn),
        ],
        [check_custom_processor(processor) for processor in custom],
    )
    if structured is not None:
        merged.append(structured)
    merged.extend(build_warpers(config))
    if config.renormalize_logits:
        merged.append(LogitNormalization())
    return LogitsProcessorList(merged)


def _biases(
    config: ResolvedConfig, unconditional_logits: Callable[[IdArray], FloatArray] | None
) -> list[ProcessorCallable]:
    chosen: list[ProcessorCallable] = []
    if config.guidance_scale != 1:
        if unconditional_logits is None:
            raise RequestError(
                f"guidance_scale={config.guidance_scale} needs the logits of an unconditional "
                "run, got none; pass unconditional_logits",
                param="guidance_scale",
            )
        chosen.append(
            UnbatchedClassifierFreeGuidanceLogitsProcessor(
                config.guidance_scale, unconditional_logits
            )
        )
    if config.sequence_bias is not None:
        chosen.append(SequenceBiasLogitsProcessor(dict(config.sequence_bias)))
    if config.logit_bias:
        chosen.append(LogitBiasLogitsProcessor(dict(config.logit_bias)))
    return chosen


def _repetition(
    config: ResolvedConfig, prompt_ids: IdArray, prompt_ignore_length: Sequence[int] | None
) -> list[ProcessorCallable]:
    chosen: list[ProcessorCallable] = []
    if config.encoder_repetition_penalty != 1.0:
        chosen.append(
            EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, prompt_ids)
        )
    if config.repetition_penalty != 1.0:
        chosen.append(
            RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_ignore_length)
        )
    if config.presence_penalty:
        chosen.append(
            PresencePenaltyLogitsProcessor(config.presence_penalty, config.prompt_length)
        )
    if config.frequency_penalty:
        chosen.append(
            FrequencyPenaltyLogitsProcessor(config.frequency_penalty, config.prompt_length)
        )
    if config.no_repeat_ngram_size > 0:
        chosen.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size > 0:
        chosen.append(
            EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, prompt_ids)
        )
    if config.bad_words_ids is not None:
        chosen.append(NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_ids))
    return chosen


def _constraints(
    config: ResolvedConfig,
    prompt_ids: IdArray,
    prefix_allowed_tokens_fn: Callable[[int, IdArray], Iterable[int]] | None,
) -> list[ProcessorCallable]:
    eos, length = config.eos_token_ids, config.prompt_length
    forced_bos = config.forced_bos_token_id
    chosen: list[ProcessorCallable] = []
    if eos and config.min_length > 0:
        chosen.append(MinLengthLogitsProcessor(config.min_length, eos))
    if eos and config.min_new_tokens > 0:
        chosen.append(MinNewTokensLengthLogitsProcessor(length, config.min_new_tokens, eos))
    if prefix_allowed_tokens_fn is not None:
        chosen.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, config.num_beams))
    if forced_bos is not None:
        chosen.append(ForcedBOSTokenLogitsProcessor(forced_bos))
    if config.forced_eos_token_ids is not None:
        chosen.append(
            ForcedEOSTokenLogitsProcessor(config.max_length, config.forced_eos_token_ids)
        )
    if config.remove_invalid_values:
        chosen.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        chosen.append(
            ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, length)
        )
    if config.suppress_tokens is not None:
        chosen.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None:
        # A forced first token takes the place of the first generated one.
        begin = length + 1 if length == 1 and forced_bos is not None else length
        chosen.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return chosen


def build_warpers(config: ResolvedConfig) -> list[ProcessorCallable]:
    """Create the processors that only sampling uses, in transformers' order.

    Args:
        config: The settings.

    Returns:
        The warpers; none unless the settings sample.

    Raises:
        RequestError: Naming a setting that is active and out of its range.
    """
    if not config.do_sample:
        return []
    # Beams need a token beside the end tokens, to explore a continuation.
    least = 1 if config.num_beams == 1 else max(2, len(config.eos_token_ids) + 1)
    chosen: list[ProcessorCallable] = []
    if config.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        chosen.append(TopHLogitsWarper(config.top_h))
    if config.top_k != 0:
        chosen.append(TopKLogitsWarper(config.top_k, least))
    if config.top_p < 1.0:
        chosen.append(TopPLogitsWarper(config.top_p, least))
    if config.min_p is not None:
        chosen.append(MinPLogitsWarper(config.min_p, least))
    if config.typical_p < 1.0:
        chosen.append(TypicalLogitsWarper(config.typical_p, least))
    if 0.0 < config.epsilon_cutoff < 1.0:
        chosen.append(EpsilonLogitsWarper(config.epsilon_cutoff, least))
    if 0.0 < config.eta_cutoff < 1.0:
        chosen.append(EtaLogitsWarper(config.eta_cutoff, least))
    return chosen


def _merge(
    built: list[ProcessorCallable], custom: list[ProcessorCallable]
) -> list[ProcessorCallable]:
    merged: list[ProcessorCallable] = []
    for processor in built:
        replacement = next((c for c in custom if type(c) is type(processor)), None)
        if replacement is not None:
            warnings.warn(
                f"the custom logits processor of type {type(processor).__name__} replaces the one "
                "that the settings ask for; leave out one of them",
                UserWarning,
                stacklevel=4,
            )
        merged.append(processor if replacement is None else replacement)
    merged.extend(c for c in custom if not any(c is m for m in merged))
    return merged
