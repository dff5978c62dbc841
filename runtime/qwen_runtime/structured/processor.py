"""The logits processor that keeps an answer inside a grammar."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.checks import check_int
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.structured.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from qwen_runtime.resolved_config import ResolvedConfig

__all__ = ["StructuredOutputLogitsProcessor", "structured_output_processor"]

ByteArray = NDArray[np.uint8]

_ID_BYTES = np.dtype(np.int64).itemsize
_MIN_STATES = 32
"""States kept at least. One that was dropped is replayed, at about 1 µs a token."""

# For each byte of a mask, the least upper bounds of the eight scores it stands for.
_BOUNDS: FloatArray = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1,
    np.float32(np.inf),
    np.float32(-np.inf),
)


class _State:
    """Where a sequence of generated ids stands in the grammar."""

    __slots__ = ("consumed", "ended", "matcher")

    def __init__(self, matcher: LLMatcher, consumed: int = 0, ended: bool = False) -> None:
        self.matcher = matcher
        self.consumed = consumed  # ids the matcher has taken, from the first one on
        self.ended = ended  # by an end token, or an id that is outside of the grammar

    def fork(self) -> _State:
        return _State(self.matcher.deep_copy(), self.consumed, self.ended)

    def advance(self, ids: Iterable[int], eos: frozenset[int]) -> None:
        for token_id in ids:
            if self.ended:
                return
            if token_id in eos or not self.matcher.try_consume_tokens([token_id]):
                self.ended = True
            else:
                self.consumed += 1


class StructuredOutputLogitsProcessor(LogitsProcessor):
    """Allow only tokens that continue an answer of the grammar, and its end where it may end.

    Rows carry nothing from step to step: a row's place in the grammar follows from its ids. So
    rows may be reordered, copied, shortened and repeated between calls. States of recent ids are
    kept; one that continues by a token costs that token only.

    Where an answer is complete, or a row has ended or left the grammar (pads behind its end,
    rejected drafts), only end tokens are allowed, even those that another processor removed.

    Args:
        grammar: From `GrammarCompiler`.
        prompt_length: Ids before the answer, padding included, >= 0.
        eos_token_id: End token or tokens; ids outside the vocabulary do nothing.

    Raises:
        RequestError: If there is no end token inside the vocabulary.
    """

    def __init__(
        self, grammar: Grammar, prompt_length: int, eos_token_id: int | Iterable[int]
    ) -> None:
        given = [eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id]
        self.prompt_length = check_int(prompt_length, name="prompt_length", minimum=0)
        self.eos_token_id = [i for i in given if 0 <= i < grammar.vocab_size]
        if not self.eos_token_id:
            raise RequestError(
                "response_format needs an end token, to end an answer that is complete, got "
                f"eos_token_id={given}; set eos_token_id",
                param="eos_token_id",
            )
        self._grammar = grammar
        self._eos = frozenset(self.eos_token_id)
        self._states: OrderedDict[bytes, _State] = OrderedDict()

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Mask what the grammar does not allow; see :class:`LogitsProcessor`.

        Raises:
            RequestError: If other processors removed every token that the grammar allows, or
                the grammar grew beyond its limits.
        """
        if scores.shape[1] != self._grammar.vocab_size:
            raise RequestError(
                f"scores must have the grammar's {self._grammar.vocab_size} tokens, got "
                f"{scores.shape[1]}; compile the format for this model",
                param="response_format",
            )
        answers = np.ascontiguousarray(input_ids[:, self.prompt_length :], dtype=np.int64)
        keys = [row.tobytes() for row in answers]
        states = self._advance(answers, keys)
        masks = {key: self._mask(state) for key, state in states.items()}
        return self._apply(
            np.stack([masks[key] for key in keys]), [states[k] for k in keys], scores
        )

    def _advance(self, answers: IdArray, keys: list[bytes]) -> dict[bytes, _State]:
        """The state of every different row."""
        states: dict[bytes, _State] = {}
        fresh = dict(zip(keys, answers, strict=True))
        children = Counter(key[:-_ID_BYTES] for key in fresh if key not in self._states)
        for key, row in fresh.items():
            state = self._states.get(key)
            if state is None:
                parent = key[:-_ID_BYTES]
                children[parent] -= 1
                state = self._child(parent, children[parent] == 0) if key else None
                if state is None:
                    state = self._replayed(row)
                else:
                    state.advance([int(row[-1])], self._eos)
                self._states[key] = state
            states[key] = state
        for key in states:
            self._states.move_to_end(key)
        while len(self._states) > max(_MIN_STATES, 2 * len(states)):
            self._states.popitem(last=False)
        return states

    def _child(self, parent: bytes, last: bool) -> _State | None:
        """The parent's state for its child: itself for the last one, a copy for the others."""
        if last:
            return self._states.pop(parent, None)
        state = self._states.get(parent)
        return None if state is None else state.fork()

    def _replayed(self, row: IdArray) -> _State:
        """A new state, from the kept one that shares the longest beginning."""
        best, shared = None, 0
        for key, state in self._states.items():
            ids = np.frombuffer(key, np.int64)[: state.consumed]
            length = min(len(ids), len(row))
            differing = np.flatnonzero(ids[:length] != row[:length])
            common = int(differing[0]) if differing.size else length
            if common > shared:
                best, shared = state, common
        if best is None:
            state = _State(self._grammar.matcher())
        else:
            state = _State(best.matcher.deep_copy(), shared)
            if best.consumed > shared:
                state.matcher.rollback(best.consumed - shared)
        state.advance(row[shared:].tolist(), self._eos)
        return state

    def _mask(self, state: _State) -> ByteArray:
        """One bit for every id, the lowest first; bits behind the vocabulary are undefined."""
        num_bytes = -(-self._grammar.vocab_size // 8)
        matcher = state.matcher
        over = state.ended or matcher.is_stopped()
        if over:
            mask = np.zeros(num_bytes, np.uint8)
        else:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)[:num_bytes].copy()
        if matcher.is_error():
            raise RequestError(
                "response_format became too complex while the answer was generated: "
                f"{matcher.get_error().splitlines()[0]}; simplify the format",
                param="response_format",
            )
        ending = over or matcher.is_accepting()
        for token_id in self.eos_token_id:
            bit = np.uint8(1 << token_id % 8)
            mask[token_id // 8] = (
                mask[token_id // 8] | bit if ending else mask[token_id // 8] & ~bit
            )
        return mask

    def _apply(self, masks: ByteArray, states: list[_State], scores: FloatArray) -> FloatArray:
        rows, vocab_size = scores.shape
        bounds = _BOUNDS.take(masks, axis=0).reshape(rows, -1)[:, :vocab_size]
        masked = np.minimum(bounds, scores, out=bounds)
        for row in np.flatnonzero(masked.max(axis=1) == -np.inf):
            if not states[row].ended and not states[row].matcher.is_stopped():
                raise RequestError(
                    "other settings removed every token that response_format allows next; loosen "
                    "bad_words_ids, suppress_tokens, logit_bias, no_repeat_ngram_size or the "
                    "custom processors",
                    param="response_format",
                )
            masked[row, self.eos_token_id] = 0
        return masked


def structured_output_processor(
    grammar: Grammar, config: ResolvedConfig
) -> StructuredOutputLogitsProcessor:
    """Make the processor of one request, or of one padded batch.

    Args:
        grammar: From `GrammarCompiler`.
        config: The request's settings.

    Raises:
        RequestError: If there is no end token, or a setting forces tokens.
    """
    for name, value in (
        ("forced_bos_token_id", config.forced_bos_token_id),
        ("forced_eos_token_id", config.forced_eos_token_ids),
    ):
        if value is not None:
            raise RequestError(
                f"{name} forces a token whatever response_format allows, got both; leave out one",
                param=name,
            )
    return StructuredOutputLogitsProcessor(grammar, config.prompt_length, config.eos_token_ids)
