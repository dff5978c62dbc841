"""Prompts as the state machines take them: padded ids, and the real tokens of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.generation.base import IntArray

__all__ = ["PromptBatch", "checked_ids"]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """One prompt, or several padded to one length.

    No padding reaches a graph: ``tokens`` are what is run; ``input_ids`` are what processors see
    and what is returned.
    """

    input_ids: IntArray
    """Prompts with padding, [rows, length]."""
    tokens: tuple[IntArray, ...]
    """Real tokens of every row, [S_i]."""
    ignore_lengths: tuple[int, ...] | None = None
    """Leading pads of every row, which the repetition penalty skips; None without padding."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.tokens)

    @classmethod
    def single(cls, ids: Sequence[int] | npt.ArrayLike, vocab_size: int) -> PromptBatch:
        """One prompt without padding.

        Args:
            ids: Token ids, at least one, each in 0..vocab_size-1.
            vocab_size: Number of logits.

        Raises:
            RequestError: If there is no token, or one is no such id.
        """
        row = checked_ids(ids, vocab_size, ndim=1)
        return cls(row[None], (row,))

    @classmethod
    def padded(
        cls,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None,
        vocab_size: int,
        *,
        pad_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> PromptBatch:
        """A batch as transformers takes it.

        Args:
            input_ids: [rows, length].
            attention_mask: 1 for real tokens, 0 for pads, [rows, length]; None as in
                transformers: pads are recognised by their id, unless that is an end token too.
            vocab_size: Number of logits.
            pad_token_id: The pad token as set, or None.
            eos_token_ids: The end tokens.

        Raises:
            RequestError: If shapes differ, a row is empty or padded on the right, or an id is
                out of range.

        Source:
            ``_prepare_attention_mask_for_generation`` of transformers 5.23.
        """
        ids = checked_ids(input_ids, vocab_size, ndim=2)
        if attention_mask is not None:
            mask = _checked_mask(attention_mask, ids.shape)
        elif pad_token_id is not None and pad_token_id not in eos_token_ids:
            mask = ids != pad_token_id
        else:
            mask = np.ones(ids.shape, bool)
        if not mask.any(axis=1).all():
            row = int((~mask.any(axis=1)).argmax())
            raise RequestError(
                f"every row must have at least one token, but row {row} is all padding",
                param="attention_mask",
            )
        if not mask[:, -1].all():
            row = int((~mask[:, -1]).argmax())
            raise RequestError(
                f"rows must be padded on the left, but row {row} ends with padding; move the "
                "pads to its front",
                param="attention_mask",
            )
        tokens = tuple(row[keep] for row, keep in zip(ids, mask, strict=True))
        if mask.all():
            return cls(ids, tokens)
        return cls(ids, tokens, tuple(int(n) for n in mask.argmax(axis=1)))

    def expand(self, copies: int) -> PromptBatch:
        """Every row ``copies`` times, neighbours."""
        if copies == 1:
            return self
        return PromptBatch(
            self.input_ids.repeat(copies, axis=0),
            tuple(row for row in self.tokens for _ in range(copies)),
            None
            if self.ignore_lengths is None
            else tuple(n for n in self.ignore_lengths for _ in range(copies)),
        )

    def require_room(self, max_new_tokens: int, max_context: int) -> None:
        """Check that the longest row fits with what it is to generate.

        Raises:
            CapacityError: If it does not.
        """
        if self.longest > max_context:
            raise CapacityError(
                f"the prompt must have at most {max_context} tokens (the bundle's max_context, or "
                f"the capacity of its engine), got {self.longest}; shorten it, or rebuild the "
                "bundle with a larger --max-context, or the engine with a larger --capacity",
                param="prompt",
            )
        if self.longest + max_new_tokens > max_context + 1:
            raise CapacityError(
                f"prompt and new tokens must fit into {max_context} tokens (the bundle's "
                f"max_context, or the capacity of its engine), got {self.longest} + "
                f"{max_new_tokens}; lower max_new_tokens to {max_context + 1 - self.longest} or "
                "shorten the prompt",
                param="max_new_tokens",
            )


def checked_ids(ids: npt.ArrayLike, vocab_size: int, *, ndim: int) -> IntArray:
    """Token ids as an array.

    Args:
        ids: A list of ids (``ndim`` 1) or rows of one length (``ndim`` 2).
        vocab_size: Number of logits.
        ndim: 1 or 2.

    Raises:
        RequestError: If there is none, or one is no integer in 0..vocab_size-1.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise RequestError(
            "input_ids must be rows of one length; pad them on the left and pass attention_mask",
            param="input_ids",
        ) from error
    if array.size == 0:
        raise RequestError("the prompt must have at least one token, got none", param="prompt")
    if array.ndim != ndim or array.dtype.kind not in "iu" or _holds_bool(ids):
        what = "a list of token ids" if ndim == 1 else "a matrix [rows, length] of token ids"
        kind = "bool" if _holds_bool(ids) else array.dtype
        raise RequestError(
            f"input_ids must be {what} (integers), got {kind} of shape {list(array.shape)}",
            param="input_ids",
        )
    bad = array[(array < 0) | (array >= vocab_size)]
    if bad.size:
        raise RequestError(
            f"token ids must be in 0..{vocab_size - 1} (the vocabulary), got {int(bad[0])}",
            param="input_ids",
        )
    return array.astype(np.int64)


def _holds_bool(ids: object) -> bool:
    """Whether a list has a bool among its integers, which NumPy would take for 0 or 1."""
    if isinstance(ids, list | tuple):
        return any(_holds_bool(item) for item in ids)
    return isinstance(ids, bool)


def _checked_mask(attention_mask: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    try:
        mask = np.asarray(attention_mask)
    except ValueError as error:
        raise RequestError(
            "attention_mask must be rows of one length", param="attention_mask"
        ) from error
    if mask.shape != shape or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise RequestError(
            f"attention_mask must hold 0 and 1 in the shape of input_ids {list(shape)}, got "
            f"{mask.dtype} of shape {list(mask.shape)}",
            param="attention_mask",
        )
    return mask.astype(bool)
