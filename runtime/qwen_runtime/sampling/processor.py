"""What a logits processor is, and the list that applies several in order."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = ["LogitsProcessor", "LogitsProcessorList", "ProcessorCallable", "check_custom_processor"]

ProcessorCallable: TypeAlias = Callable[[IdArray, FloatArray], FloatArray]
"""(input_ids [rows, length] int64, scores [rows, vocab] float32) -> scores [rows, vocab]."""


class LogitsProcessor(ABC):
    """Base of the built-in processors. They never modify the scores they receive."""

    @abstractmethod
    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Process the scores of the next token.

        Args:
            input_ids: Prompt and tokens so far, [rows, length] int64.
            scores: Scores of the next token, [rows, vocab] float32. Not modified.

        Returns:
            New scores, [rows, vocab] float32; the same array where nothing changes.
        """

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist | None:
        """Process the highest scores of one row, and the bound on all others, as the whole row.

        Args:
            input_ids: Prompt and tokens so far, [length] int64.
            shortlist: The highest scores of the next token.

        Returns:
            The same tokens with the very scores they have in the processed row, and a bound on
            those of all others; None where the whole row is needed.
        """
        return None

    def shortens(self) -> bool:
        """Whether `shorten` may be called: it belongs to this very ``__call__``."""
        kinds = type(self).__mro__
        call, short = (
            next(kind for kind in kinds if name in vars(kind)) for name in ("__call__", "shorten")
        )
        return call is short and call is not LogitsProcessor


class LogitsProcessorList(list[ProcessorCallable]):
    """Processors applied one after the other, under transformers' name."""

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Apply every processor in order.

        Args:
            input_ids: Prompt and tokens so far, [rows, length] int64.
            scores: Scores of the next token, [rows, vocab] float32. Not modified.

        Returns:
            Processed scores, [rows, vocab] float32.

        Raises:
            RequestError: If a processor returns anything but scores of the same shape.
        """
        received = scores
        for processor in self:
            if isinstance(processor, LogitsProcessor):
                scores = processor(input_ids, scores)
                continue
            # A user's processor may write into its argument, as it may in transformers.
            returned = processor(input_ids, scores.copy() if scores is received else scores)
            scores = _checked_scores(returned, received, processor)
        return scores


def _checked_scores(
    returned: object, received: FloatArray, processor: ProcessorCallable
) -> FloatArray:
    if not isinstance(returned, np.ndarray) or returned.shape != received.shape:
        shape = list(returned.shape) if isinstance(returned, np.ndarray) else ""
        raise RequestError(
            f"a logits processor must return scores of shape {list(received.shape)}, got "
            f"{type(returned).__name__} {shape} from {_name(processor)}; return the scores array",
            param="logits_processor",
        )
    return returned.astype(np.float32, copy=False)


def check_custom_processor(processor: object) -> ProcessorCallable:
    """Check that a user's object can be called as a processor.

    Args:
        processor: What the user passed.

    Returns:
        The same object.

    Raises:
        RequestError: If it cannot be called with (input_ids, scores) alone.
    """
    if not callable(processor):
        raise RequestError(
            f"logits_processor must hold callables (input_ids, scores) -> scores, "
            f"got {processor!r}; pass functions or objects with __call__",
            param="logits_processor",
        )
    required = _required_parameters(processor)
    if required is not None and len(required) != 2:
        raise RequestError(
            f"a logits processor is called with (input_ids, scores), but {_name(processor)} "
            f"requires {required}; bind its other arguments beforehand",
            param="logits_processor",
        )
    return processor


def _required_parameters(processor: Callable[..., object]) -> list[str] | None:
    """Names without a default, or None where the signature is unknown or open."""
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    parameters = list(parameters)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        p.name
        for p in parameters
        if p.default is inspect.Parameter.empty and p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    # Two parameters may carry defaults and still be filled by position.
    if len(required) < 2 and sum(p.kind in positional for p in parameters) >= 2:
        return None
    return required


def _name(processor: object) -> str:
    return getattr(processor, "__name__", type(processor).__name__)
