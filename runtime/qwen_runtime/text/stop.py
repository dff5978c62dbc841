"""Stop strings: where one ends in the bytes of the tokens, and which one.

stop_strings ── StopStringMatcher ── .match(ids)        one look at the end of a sequence
                        │
                        └── .cursor(prompt_ids)         the same, a token at a time
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen_runtime.errors import RequestError
from qwen_runtime.text.tokenizer import Tokenizer

__all__ = ["StopMatch", "StopStringCursor", "StopStringMatcher"]

_ROOT = 0


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that ends inside the last token of a sequence."""

    stop_string: str
    """The string as it was given."""
    length_bytes: int
    """Its length in UTF-8."""
    overhang_bytes: int
    """Bytes of the last token that follow it; 0 if the token ends with it."""


class _Automaton:
    """Aho-Corasick over bytes: a state is the longest beginning of a pattern just seen."""

    def __init__(self, patterns: Sequence[bytes]) -> None:
        self.depth = [0]
        self.found: list[int | None] = [None]
        self._next: list[dict[int, int]] = [{}]
        self._fail = [_ROOT]
        for index, pattern in enumerate(patterns):
            state = _ROOT
            for byte in pattern:
                state = self._next[state].get(byte) or self._add(state, byte)
            if self.found[state] is None:  # of equal strings the first is reported
                self.found[state] = index
        self._link()

    def _add(self, parent: int, byte: int) -> int:
        state = len(self.depth)
        self.depth.append(self.depth[parent] + 1)
        self.found.append(None)
        self._next.append({})
        self._fail.append(_ROOT)
        self._next[parent][byte] = state
        return state

    def _link(self) -> None:
        """Set each state's longest proper suffix that is a state, shallow states first."""
        queue = deque(self._next[_ROOT].values())
        while queue:
            state = queue.popleft()
            for byte, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], byte)
                if self.found[child] is None:  # the longest pattern that ends here wins
                    self.found[child] = self.found[self._fail[child]]
                queue.append(child)

    def step(self, state: int, byte: int) -> int:
        """Return the state after one more byte; amortised constant time."""
        while True:
            following = self._next[state].get(byte)
            if following is not None:
                return following
            if state == _ROOT:
                return _ROOT
            state = self._fail[state]


class StopStringMatcher:
    """Finds stop strings that end inside the last token of a sequence.

    The bytes of the tokens are searched, so a stop string may straddle tokens, share a token
    with other text and begin in the prompt. Special tokens take part with their text; an id
    outside the tokenizer separates what stands before it from what follows. Of several stop
    strings that end in one token the one that is complete first is reported, the longest of
    those that end together: the answer does not depend on how the text fell into tokens.

    Args:
        tokenizer: Where the bytes of the tokens come from.
        stop_strings: One string or several.

    Raises:
        RequestError: If there is no stop string, one is empty, no string or no valid Unicode,
            or no sequence of this tokenizer's tokens can contain it.

    Source:
        ``transformers.StopStringCriteria`` 5.23, which reports that there is a match, not which.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: str | Sequence[str]) -> None:
        listed = _listed(stop_strings)
        self.stop_strings: tuple[str, ...] = listed
        self.tokenizer = tokenizer
        if not listed:
            raise RequestError(
                "stop_strings must hold at least one string, got none; leave the argument out",
                param="stop_strings",
            )
        self.patterns = [_to_bytes(stop_string) for stop_string in listed]
        for stop_string, pattern in zip(listed, self.patterns, strict=True):
            _check_reachable(tokenizer, stop_string, pattern)
        self.automaton = _Automaton(self.patterns)
        self._longest = max(len(pattern) for pattern in self.patterns)

    def match(self, ids: Sequence[int]) -> StopMatch | None:
        """Look at the end of a sequence.

        Args:
            ids: Prompt and generated ids, the newest last; any indexable sequence of integers.

        Returns:
            The match that ends inside the last token, or None.
        """
        # A match reaches back by less than the longest string before the last token.
        start, num_bytes = len(ids), 0
        while start > 0 and (start == len(ids) or num_bytes < self._longest - 1):
            start -= 1
            raw = self.tokenizer.token_bytes(int(ids[start]))
            if not raw:
                break
            num_bytes += len(raw) if start < len(ids) - 1 else 0
        cursor = StopStringCursor(self)
        match = None
        for token_id in ids[start:]:
            match = cursor.push(int(token_id))
        return match

    def cursor(self, context_ids: Sequence[int] = ()) -> StopStringCursor:
        """Begin to follow a sequence whose prompt is ``context_ids``."""
        cursor = StopStringCursor(self)
        # More tokens than the longest string has bytes can't matter: a token has one or more.
        for token_id in context_ids[max(0, len(context_ids) - self._longest) :]:
            cursor.push(int(token_id))
        return cursor


class StopStringCursor:
    """Follows one sequence; a token costs its own bytes. Made by ``StopStringMatcher.cursor``."""

    def __init__(self, matcher: StopStringMatcher) -> None:
        self._matcher = matcher
        self._state = _ROOT

    @property
    def pending_bytes(self) -> int:
        """How many of the last bytes may be the beginning of a stop string."""
        return self._matcher.automaton.depth[self._state]

    def push(self, token_id: int) -> StopMatch | None:
        """Append a token; return the match that ends inside it, or None."""
        automaton, match, state = self._matcher.automaton, None, self._state
        raw = self._matcher.tokenizer.token_bytes(token_id)
        if not raw:
            state = _ROOT
        for position, byte in enumerate(raw, start=1):
            state = automaton.step(state, byte)
            index = automaton.found[state]
            if index is not None and match is None:
                match = StopMatch(
                    stop_string=self._matcher.stop_strings[index],
                    length_bytes=len(self._matcher.patterns[index]),
                    overhang_bytes=len(raw) - position,
                )
        self._state = state
        return match

    def copy(self) -> StopStringCursor:
        """Return a cursor at the same place, for a sequence that forks."""
        twin = StopStringCursor(self._matcher)
        twin._state = self._state
        return twin


def _listed(stop_strings: object) -> tuple[str, ...]:
    if isinstance(stop_strings, str):
        return (stop_strings,)
    if isinstance(stop_strings, (list, tuple)):
        return tuple(stop_strings)
    raise RequestError(
        "stop_strings must be a string or a list of strings, got "
        f"{type(stop_strings).__name__}; pass ['...']",
        param="stop_strings",
    )


def _to_bytes(stop_string: object) -> bytes:
    if not isinstance(stop_string, str):
        raise RequestError(
            f"stop_strings must hold strings, got {type(stop_string).__name__}; "
            "pass a string or a list of strings",
            param="stop_strings",
        )
    if not stop_string:
        raise RequestError(
            "a stop string must not be empty, or it would match everywhere; "
            "leave '' out of stop_strings",
            param="stop_strings",
        )
    try:
        return stop_string.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a stop string must be valid Unicode, but {stop_string!r} holds half of a surrogate "
            "pair; correct stop_strings",
            param="stop_strings",
        ) from error


def _check_reachable(tokenizer: Tokenizer, stop_string: str, pattern: bytes) -> None:
    if tokenizer.has_every_byte or _is_reachable(tokenizer.vocabulary_bytes().values(), pattern):
        return
    raise RequestError(
        f"a stop string must be one that tokens can spell, but no sequence of this tokenizer's "
        f"tokens contains {stop_string!r}; choose another in stop_strings",
        param="stop_strings",
    )


def _is_reachable(tokens: Iterable[bytes], pattern: bytes) -> bool:
    """Tell whether some sequence of tokens contains a pattern.

    ``starts`` are the offsets that a token boundary can have inside the pattern: after a token
    whose end is the pattern's beginning, and from there token by token.
    """
    vocabulary = {token for token in tokens if token}
    if any(pattern in token for token in vocabulary):
        return True
    prefixes = {token[:n] for token in vocabulary for n in range(1, len(token) + 1)}
    suffixes = {token[-n:] for token in vocabulary for n in range(1, len(token) + 1)}
    longest = max(map(len, vocabulary), default=0)
    starts = {n for n in range(1, min(longest + 1, len(pattern))) if pattern[:n] in suffixes}
    for start in range(1, len(pattern)):
        if start not in starts:
            continue
        if pattern[start:] in prefixes:
            return True
        ends = range(start + 1, min(start + longest + 1, len(pattern)))
        starts.update(end for end in ends if pattern[start:end] in vocabulary)
    return False
