"""Classifier-free guidance: the unconditional branch is more rows of the same request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import Decoding, Feed, FloatArray, IntArray, Step
from qwen_runtime.generation.prompts import PromptBatch

__all__ = ["Guidable", "Guidance", "GuidedDecoding", "negative_prompts"]


class Guidable(Decoding, Protocol):
    """A state machine that can be guided."""

    @property
    def fed_tokens(self) -> Mapping[int, int]:
        """Of the step just asked for: the token that each row continues with; none at first."""


class Guidance:
    """The unconditional logits of every row, as processors ask for them.

    Args:
        prompts: Where the unconditional branch of each row begins, [S_i] each.
    """

    def __init__(self, prompts: Sequence[IntArray]) -> None:
        self.prompts = tuple(prompts)
        self._logits: list[FloatArray] = [np.empty(0, np.float32)] * len(prompts)

    def receive(self, row: int, logits: FloatArray) -> None:
        """Take a row's logits, [V]."""
        self._logits[row] = logits

    def logits_of(self, first: int, last: int) -> Callable[[IntArray], FloatArray]:
        """What `UnbatchedClassifierFreeGuidanceLogitsProcessor` calls for rows first..last-1."""
        return lambda ids: np.stack(self._logits[first:last])


class GuidedDecoding:
    """Runs a state machine with an unconditional branch for each of its rows.

    As in transformers, the branch of a row is fed the row's newest token, and in beam search it
    stays where it is when beams change places.

    Args:
        inner: The state machine whose processors use ``guidance``.
        guidance: Where the unconditional logits go.
    """

    def __init__(self, inner: Guidable, guidance: Guidance) -> None:
        self._inner = inner
        self._guidance = guidance
        self._held = [0] * len(guidance.prompts)
        self._rows: list[int] = []

    @property
    def num_rows(self) -> int:
        """See `Decoding.num_rows`."""
        return self._inner.num_rows + len(self._held)

    @property
    def finished(self) -> bool:
        """See `Decoding.finished`."""
        return self._inner.finished

    def next_step(self) -> Step:
        """See `Decoding.next_step`."""
        step = self._inner.next_step()
        tokens = self._inner.fed_tokens
        if tokens:
            branches = {row: np.array([token], np.int64) for row, token in tokens.items()}
        else:
            branches = dict(enumerate(self._guidance.prompts))
        feeds = []
        for row, new in branches.items():
            feeds.append(Feed(self._inner.num_rows + row, new, past=self._held[row], want=1))
            self._held[row] += len(new)
        self._rows = list(branches)
        return Step((*step.feeds, *feeds), step.copies)

    def accept(self, logits: Sequence[FloatArray]) -> None:
        """See `Decoding.accept`."""
        own = len(logits) - len(self._rows)
        for row, values in zip(self._rows, logits[own:], strict=True):
            self._guidance.receive(row, values[-1])
        self._inner.accept(logits[:own])

    def note_cached(self, row: int, num_tokens: int) -> None:
        """See `Decoding.note_cached`."""
        if row < self._inner.num_rows:
            self._inner.note_cached(row, num_tokens)

    def cancel(self) -> None:
        """See `Decoding.cancel`."""
        self._inner.cancel()


def negative_prompts(
    ids: npt.ArrayLike | Sequence[Sequence[int]],
    mask: npt.ArrayLike | None,
    vocab_size: int,
) -> tuple[IntArray, ...]:
    """Read ``negative_prompt_ids``.

    Args:
        ids: One list of ids, a list of them, or a matrix [rows, length].
        mask: 1 for tokens, 0 for pads on the left, [rows, length]; None without pads.
        vocab_size: Number of logits.

    Returns:
        Tokens of every row, [S_i] each.

    Raises:
        RequestError: If they are no such ids, or pads stand elsewhere than on the left.
    """
    try:
        if mask is not None:
            tokens = PromptBatch.padded(ids, mask, vocab_size).tokens
        else:
            rows = [ids] if np.ndim(ids[0]) == 0 else ids  # type: ignore[index]  # any nesting; refused below
            tokens = tuple(PromptBatch.single(row, vocab_size).tokens[0] for row in rows)  # type: ignore[union-attr]  # as above
    except (IndexError, TypeError):
        raise _wrong(f"expected a list of token ids per prompt, got {ids!r:.60}") from None
    except RequestError as error:
        raise _wrong(str(error)) from error
    if mask is not None and (np.diff(np.asarray(mask).astype(np.int64), axis=1) < 0).any():
        raise _wrong("pads must stand on the left; pass rows without pads as lists, no mask")
    return tokens


def _wrong(reason: str) -> RequestError:
    return RequestError(f"negative_prompt_ids: {reason}", param="negative_prompt_ids")
