"""Processors that ban or force tokens: lengths, suppression, forced tokens, allowed prefixes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.checks import check_int, token_ids
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = [
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
]


def _only(scores: FloatArray, ids: Sequence[int]) -> FloatArray:
    """Scores of 0 for the given tokens and ``-inf`` for all others."""
    processed = np.full_like(scores, -np.inf)
    processed[:, list(ids)] = 0
    return processed


class _BanAtLengths(LogitsProcessor):
    """Base of the processors that ban tokens by the length of the sequence alone."""

    @abstractmethod
    def _banned(self, length: int) -> Iterable[int]:
        """What is banned for sequences of a length; ids outside the vocabulary do nothing."""

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Ban the tokens; see :class:`LogitsProcessor`."""
        banned = self._known(input_ids.shape[1], scores.shape[1])
        if not banned:
            return scores
        processed = scores.copy()
        processed[:, banned] = -np.inf
        return processed

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist:
        """Ban the tokens; see :meth:`LogitsProcessor.shorten`."""
        banned = self._known(input_ids.shape[0], shortlist.vocab_size)
        return shortlist.without(np.array(banned, np.int64)) if banned else shortlist

    def _known(self, length: int, vocab_size: int) -> list[int]:
        """What is banned of the vocabulary: an id outside of it need not fit into an array."""
        return [i for i in self._banned(length) if 0 <= i < vocab_size]


class MinLengthLogitsProcessor(_BanAtLengths):
    """Ban the end tokens until the whole sequence has a length.

    Args:
        min_length: Least length, prompt and padding included, >= 0.
        eos_token_id: End token or tokens; negative ones do nothing.

    Raises:
        RequestError: If ``min_length`` is not such an integer.
    """

    def __init__(self, min_length: int, eos_token_id: int | Iterable[int]) -> None:
        self.min_length = check_int(min_length, name="min_length", minimum=0)
        self.eos_token_id = [eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id]

    def _banned(self, length: int) -> Iterable[int]:
        return () if length >= self.min_length else self.eos_token_id


class MinNewTokensLengthLogitsProcessor(_BanAtLengths):
    """Ban the end tokens until enough tokens are generated.

    Args:
        prompt_length_to_skip: Length of the prompt, padding included, >= 0.
        min_new_tokens: Least number of generated tokens, >= 0.
        eos_token_id: End token or tokens; negative ones do nothing.

    Raises:
        RequestError: If a length is not such an integer.
    """

    def __init__(
        self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: int | Iterable[int]
    ) -> None:
        self.prompt_length_to_skip = check_int(
            prompt_length_to_skip, name="prompt_length_to_skip", minimum=0
        )
        self.min_new_tokens = check_int(min_new_tokens, name="min_new_tokens", minimum=0)
        self.eos_token_id = [eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id]

    def _banned(self, length: int) -> Iterable[int]:
        enough = length - self.prompt_length_to_skip >= self.min_new_tokens
        return () if enough else self.eos_token_id


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allow only the tokens a function names for the sequence so far.

    Args:
        prefix_allowed_tokens_fn: ``(prompt index, ids [length]) -> allowed token ids``.
        num_beams: Consecutive rows that belong to one prompt.
    """

    def __init__(
        self, prefix_allowed_tokens_fn: Callable[[int, IdArray], Iterable[int]], num_beams: int
    ) -> None:
        self._allowed = prefix_allowed_tokens_fn
        self._num_beams = num_beams

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Ban everything else; see :class:`LogitsProcessor`.

        Raises:
            RequestError: If the function allows no token.
        """
        mask = np.full_like(scores, -np.inf)
        for index, ids in enumerate(input_ids):
            allowed = list(self._allowed(index // self._num_beams, ids))
            if not allowed:
                raise RequestError(
                    "prefix_allowed_tokens_fn must allow at least one token, got none for "
                    f"prompt {index // self._num_beams} at length {ids.shape[0]}; "
                    "return the end token where nothing may follow",
                    param="prefix_allowed_tokens_fn",
                )
            mask[index, allowed] = 0
        with np.errstate(invalid="ignore"):
            processed = scores + mask
        # Where earlier processors banned all that is allowed, in every beam of a prompt, the
        # constraint wins: its tokens get score 0.
        beams = processed.reshape(-1, self._num_beams * scores.shape[1])
        lost = np.repeat(np.isneginf(beams).all(axis=1), self._num_beams)
        processed[lost] = mask[lost]
        return processed


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Force the second token of a sequence that starts with a single one.

    Args:
        bos_token_id: The token, >= 0.

    Raises:
        RequestError: If it is not an id.
    """

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = check_int(bos_token_id, name="forced_bos_token_id", minimum=0)

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Force the token at length 1; see :class:`LogitsProcessor`."""
        return _only(scores, [self.bos_token_id]) if input_ids.shape[1] == 1 else scores

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist | None:
        """Nothing to do beyond length 1; see :meth:`LogitsProcessor.shorten`."""
        return None if input_ids.shape[0] == 1 else shortlist


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Force an end token as the last one before the length limit.

    Args:
        max_length: Length of the whole sequence at the limit.
        eos_token_id: Token or tokens, one of which ends the sequence.

    Raises:
        RequestError: If a token is not an id.
    """

    def __init__(self, max_length: int, eos_token_id: int | Iterable[int]) -> None:
        self.max_length = max_length
        self.eos_token_id = token_ids(eos_token_id, name="forced_eos_token_id")

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Force the end at the limit; see :class:`LogitsProcessor`."""
        last = input_ids.shape[1] == self.max_length - 1
        return _only(scores, self.eos_token_id) if last else scores

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist | None:
        """Nothing to do before the last token; see :meth:`LogitsProcessor.shorten`."""
        return None if input_ids.shape[0] == self.max_length - 1 else shortlist


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replace ``nan`` by 0 and infinities by the largest float32 of their sign."""

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Make every score finite; see :class:`LogitsProcessor`."""
        return np.nan_to_num(scores, nan=0.0)


class SuppressTokensLogitsProcessor(_BanAtLengths):
    """Ban tokens throughout.

    Args:
        suppress_tokens: The tokens; ids outside the vocabulary do nothing.
    """

    def __init__(self, suppress_tokens: Iterable[int]) -> None:
        self.suppress_tokens = list(suppress_tokens)

    def _banned(self, length: int) -> Iterable[int]:
        return self.suppress_tokens


class SuppressTokensAtBeginLogitsProcessor(_BanAtLengths):
    """Ban tokens as the first generated one.

    Args:
        begin_suppress_tokens: The tokens; ids outside the vocabulary do nothing.
        begin_index: Length of the sequence at which they are banned.
    """

    def __init__(self, begin_suppress_tokens: Iterable[int], begin_index: int) -> None:
        self.begin_suppress_tokens = list(begin_suppress_tokens)
        self.begin_index = begin_index

    def _banned(self, length: int) -> Iterable[int]:
        return self.begin_suppress_tokens if length == self.begin_index else ()
