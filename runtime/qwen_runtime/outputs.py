"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qwen_runtime.generation.base import FloatArray, IntArray
from qwen_runtime.generation.candidates import AssistedStatistics
from qwen_runtime.generation.rows import TokenLogprob

__all__ = ["AssistedStatistics", "BatchOutput", "RequestOutput", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One generated sequence."""

    text: str
    """Generated text without special tokens; cut before a string of ``stop``. Empty for a bundle
    without a tokenizer."""
    token_ids: list[int]
    """Generated ids, the end token included, without prompt and pads."""
    finish_reason: str
    """"stop" (end token, stop string or criterion), "length", "cancelled"."""
    stop_reason: str | int | None = None
    """The stop string or end token that ended it, if one did."""
    prompt_token_ids: list[int] = field(default_factory=list)
    """Prompt ids, without pads."""
    logprobs: list[TokenLogprob] | None = None
    """One per generated id, if asked for."""
    scores: list[FloatArray] | None = None
    """Processed scores of every step, [V] each, if asked for."""
    logits: list[FloatArray] | None = None
    """The model's logits of every step, [V] each, if asked for."""
    sequence_score: float | None = None
    """Beam search: sum of the token scores, divided by length ** length_penalty."""
    beam_indices: list[int] | None = None
    """Beam search: for every generated id, the beam that it continues."""
    assistance: AssistedStatistics | None = None
    """Assisted generation and prompt lookup: what they saved."""
    num_cached_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt that were not computed but found in the cache. Outputs are equal
    whatever it is."""


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What the matrix form returns: the fields of transformers' outputs, by the same names."""

    sequences: IntArray
    """Prompt and generated ids, [rows, length] int64, padded as transformers pads."""
    outputs: list[RequestOutput]
    """The same, row by row, without padding."""
    scores: tuple[FloatArray, ...] | None = None
    """Processed scores of every step, [rows, V] each, if asked for."""
    logits: tuple[FloatArray, ...] | None = None
    """The model's logits of every step, [rows, V] each, if asked for."""
    sequences_scores: FloatArray | None = None
    """Beam search: score of every sequence, [rows]; see `RequestOutput.sequence_score`."""
    beam_indices: npt.NDArray[np.int32] | None = None
    """Beam search: for every generated token the row of ``scores`` that it came from,
    [rows, generated], -1 after the end. There ``scores`` has a row per prompt and beam."""

    def __array__(
        self, dtype: np.dtype[np.generic] | None = None, copy: bool | None = None
    ) -> np.ndarray:
        """``numpy.asarray(output)`` is ``output.sequences``."""
        return np.array(self.sequences, dtype=dtype, copy=copy)
