"""Processors that add a constant to tokens, always or after a given sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = [
    "LogitBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "SequenceBias",
    "SequenceBiasLogitsProcessor",
    "check_bad_words",
    "check_sequence_bias",
]

SequenceBias: TypeAlias = (
    Mapping[tuple[int, ...], float] | Sequence[Sequence[Sequence[int] | float]]
)
"""``{(id, ...): bias}`` or ``[[[id, ...], bias], ...]``."""


def _is_token_sequence(value: object, *, may_be_empty: bool = False) -> bool:
    return (
        isinstance(value, list | tuple)
        and (may_be_empty or len(value) > 0)
        and all(
            isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in value
        )
    )


def check_sequence_bias(value: object) -> dict[tuple[int, ...], float]:
    """Check ``sequence_bias`` and bring it into one form.

    Args:
        value: Either form of :data:`SequenceBias`.

    Returns:
        Bias by token sequence; a later entry replaces an equal earlier one.

    Raises:
        RequestError: If it is empty, a sequence is empty or holds anything but ids, or a bias
            is not a float.
    """
    items: Iterable[object] = ()
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = value
    biases: dict[tuple[int, ...], float] = {}
    for item in items:
        if (
            not isinstance(item, list | tuple)
            or len(item) != 2
            or not _is_token_sequence(item[0])
            or not isinstance(item[1], float)
            or np.isnan(item[1])
        ):
            raise RequestError(
                "sequence_bias must pair non-empty lists of token ids >= 0 with float biases, "
                f"got {item!r}; write for example [[[15, 3], -2.0]]",
                param="sequence_bias",
            )
        biases[tuple(int(i) for i in item[0])] = item[1]
    if not biases:
        raise RequestError(
            "sequence_bias must be a non-empty dictionary or list of [ids, bias] pairs, "
            f"got {value!r}; leave it out to bias nothing",
            param="sequence_bias",
        )
    return biases


def check_bad_words(value: object) -> list[list[int]]:
    """Check ``bad_words_ids``.

    Args:
        value: Lists of token ids, ``[[id, ...], ...]``.

    Returns:
        The same as lists of int.

    Raises:
        RequestError: If it is empty, not nested, or holds anything but ids.
    """
    if not isinstance(value, list | tuple) or len(value) == 0:
        raise RequestError(
            f"bad_words_ids must be a non-empty list of lists, got {value!r}; "
            "leave it out to ban nothing",
            param="bad_words_ids",
        )
    for word in value:
        if not _is_token_sequence(word):
            raise RequestError(
                f"bad_words_ids must hold non-empty lists of token ids >= 0, got {word!r}; "
                "write for example [[15], [7, 3]]",
                param="bad_words_ids",
            )
    return [[int(i) for i in word] for word in value]


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Add a bias to a token, or to the last token of a sequence once the others precede it.

    Args:
        sequence_bias: Bias by token sequence, in either form of :data:`SequenceBias`.

    Raises:
        RequestError: If the form is wrong; on the first call, if an id is beyond the vocabulary.
    """

    def __init__(self, sequence_bias: SequenceBias) -> None:
        self._prepare(check_sequence_bias(sequence_bias), param="sequence_bias")

    def _prepare(self, biases: dict[tuple[int, ...], float], *, param: str) -> None:
        self.sequence_bias = biases
        self._param = param
        self._largest_id = max((max(sequence) for sequence in biases), default=-1)
        single = {ids[0]: bias for ids, bias in biases.items() if len(ids) == 1}
        self._single_ids = np.array(list(single), dtype=np.int64)
        self._single_biases = np.array(list(single.values()), dtype=np.float32)
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        for ids, bias in biases.items():
            if len(ids) > 1:
                groups[len(ids) - 1].append((ids, bias))
        # By prefix length: prefixes [sequences, length], last ids [sequences], biases.
        self._groups: list[tuple[IdArray, IdArray, FloatArray]] = [
            (
                np.array([ids[:-1] for ids, _ in group], dtype=np.int64),
                np.array([ids[-1] for ids, _ in group], dtype=np.int64),
                np.array([bias for _, bias in group], dtype=np.float32),
            )
            for group in groups.values()
        ]

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Add the biases; see :class:`LogitsProcessor`."""
        self._check_vocabulary(scores.shape[1])
        processed = scores.copy()
        for row, ids in zip(processed, input_ids, strict=True):
            with np.errstate(invalid="ignore"):
                row += self._biases_of(ids, scores.shape[1])
        return processed

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist:
        """Add the biases; the bound rises by the largest of any other token."""
        self._check_vocabulary(shortlist.vocab_size)
        biases = self._biases_of(input_ids, shortlist.vocab_size)
        here = biases[shortlist.indices]
        biases[shortlist.indices] = 0
        with np.errstate(invalid="ignore"):
            values = shortlist.values + here
            bound = shortlist.bound + biases.max()
        return replace(shortlist, values=values, bound=bound)

    def _check_vocabulary(self, vocab_size: int) -> None:
        if self._largest_id >= vocab_size:
            beyond = sorted({i for ids in self.sequence_bias for i in ids if i >= vocab_size})
            raise RequestError(
                f"{self._param} must hold token ids below the vocabulary size {vocab_size}, "
                f"got {beyond}; remove them",
                param=self._param,
            )

    def _biases_of(self, ids: IdArray, vocab_size: int) -> FloatArray:
        """What to add to the scores that follow a sequence, [vocab]."""
        # Collected first: of two biases on one token, one must not be rounded away.
        bias = np.zeros(vocab_size, dtype=np.float32)
        bias[self._single_ids] = self._single_biases
        for prefixes, last_ids, biases in self._groups:
            size = prefixes.shape[1]
            if size <= ids.shape[0]:
                hit = (prefixes == ids[ids.shape[0] - size :]).all(axis=1)
                np.add.at(bias, last_ids[hit], biases[hit])
        return bias


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Ban token sequences: their last token cannot follow the others.

    Args:
        bad_words_ids: The sequences.
        eos_token_id: End token or tokens; a sequence that is just one of them is not banned.

    Raises:
        RequestError: If the form is wrong; on the first call, if an id is beyond the vocabulary.
    """

    def __init__(
        self,
        bad_words_ids: Sequence[Sequence[int]],
        eos_token_id: int | Iterable[int] | None = None,
    ) -> None:
        self.bad_word_ids = check_bad_words(bad_words_ids)
        end = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        banned = [tuple(word) for word in self.bad_word_ids if word not in [[i] for i in end]]
        self._prepare(dict.fromkeys(banned, -np.inf), param="bad_words_ids")


class LogitBiasLogitsProcessor(SequenceBiasLogitsProcessor):
    """Add a bias to single tokens.

    Args:
        logit_bias: Bias by token id.

    Raises:
        RequestError: On the first call, if an id is beyond the vocabulary.

    Source:
        OpenAI API reference, ``logit_bias``.
    """

    def __init__(self, logit_bias: Mapping[int, float]) -> None:
        self._prepare({(i,): float(b) for i, b in logit_bias.items()}, param="logit_bias")
