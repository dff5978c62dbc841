"""From finished state machines to what callers get."""

from __future__ import annotations

from qwen_runtime.generation.assisted import AssistedDecoding
from qwen_runtime.generation.beam import BeamDecoding
from qwen_runtime.generation.rows import Generation, RowState
from qwen_runtime.outputs import BatchOutput, RequestOutput
from qwen_runtime.text import Tokenizer, trim_stop_string

__all__ = ["batch_output", "request_outputs", "text_of"]


def text_of(state: RowState, generation: Generation, tokenizer: Tokenizer | None) -> str:
    """Generated text without special tokens; cut before a string of ``stop``."""
    if tokenizer is None:
        return ""
    stop = state.stop
    if stop is not None and stop.match is not None and stop.matched in generation.config.stop:
        return trim_stop_string(tokenizer, state.token_ids, stop.match)
    return tokenizer.decode(state.token_ids, skip_special_tokens=True)


def request_outputs(generation: Generation, tokenizer: Tokenizer | None) -> list[RequestOutput]:
    """One output per row of a state machine."""
    return [
        _request_output(generation, row, state, tokenizer)
        for row, state in enumerate(generation.rows)
    ]


def _request_output(
    generation: Generation, row: int, state: RowState, tokenizer: Tokenizer | None
) -> RequestOutput:
    config, sources = generation.config, generation.score_rows(row)
    scores = [step[source] for step, source in zip(generation.scores, sources, strict=False)]
    logits = [step[source] for step, source in zip(generation.logits, sources, strict=False)]
    beams = generation if isinstance(generation, BeamDecoding) else None
    assisted = generation if isinstance(generation, AssistedDecoding) else None
    return RequestOutput(
        text=text_of(state, generation, tokenizer),
        token_ids=list(state.token_ids),
        finish_reason=state.stop.reason if state.stop else "cancelled",
        stop_reason=state.stop.matched if state.stop else None,
        prompt_token_ids=generation.prompt_tokens(row).tolist(),
        logprobs=list(state.logprobs) if config.logprobs else None,
        scores=scores if config.output_scores else None,
        logits=logits if config.output_logits else None,
        sequence_score=float(beams.sequences_scores[row]) if beams else None,
        beam_indices=beams.score_rows(row) if beams else None,
        assistance=assisted.statistics if assisted else None,
        num_cached_tokens=state.num_cached_tokens,
    )


def batch_output(generation: Generation, tokenizer: Tokenizer | None) -> BatchOutput:
    """The matrix form's output."""
    config = generation.config
    beams = generation if isinstance(generation, BeamDecoding) else None
    return BatchOutput(
        sequences=generation.input_ids.copy(),
        outputs=request_outputs(generation, tokenizer),
        scores=tuple(generation.scores) if config.output_scores else None,
        logits=tuple(generation.logits) if config.output_logits else None,
        sequences_scores=beams.sequences_scores.copy() if beams else None,
        beam_indices=beams.beam_indices.copy() if beams else None,
    )
