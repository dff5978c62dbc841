"""Classifier-free guidance: steer away from what the model would say without the prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen_runtime.sampling.numerics import FloatArray, IdArray, log_softmax
from qwen_runtime.sampling.processor import LogitsProcessor

__all__ = ["UnbatchedClassifierFreeGuidanceLogitsProcessor"]


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Move the log-probabilities away from those of an unconditional run of the model.

    Args:
        guidance_scale: 1 changes nothing but the normalisation, above 1 moves away.
        unconditional_logits: Called once per step with the ids so far, [rows, length]; returns
            the logits of the next token without the prompt, [rows, vocab].

    Source:
        Stay on Topic with Classifier-Free Guidance, arXiv:2306.17806.
    """

    def __init__(
        self, guidance_scale: float, unconditional_logits: Callable[[IdArray], FloatArray]
    ) -> None:
        self.guidance_scale = guidance_scale
        self._unconditional_logits = unconditional_logits

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Combine both runs; see :class:`LogitsProcessor`."""
        conditional = log_softmax(scores)
        if self.guidance_scale == 1:
            return conditional
        unconditional = log_softmax(self._unconditional_logits(input_ids))
        with np.errstate(invalid="ignore"):
            guided: FloatArray = (
                np.float32(self.guidance_scale) * (conditional - unconditional) + unconditional
            )
        return guided
