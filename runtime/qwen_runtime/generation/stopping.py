"""When a row is done: end tokens, lengths, time, stop strings, and the caller's criteria."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import FinishReason, FloatArray, IntArray
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.text import StopMatch, StopStringCursor, StopStringMatcher, Tokenizer

__all__ = ["Stop", "StoppingCriteria", "StoppingCriterion"]

StoppingCriterion = Callable[[IntArray, tuple[FloatArray, ...] | None], object]
"""Called with the ids [rows, length] and the scores of every step (or None); returns whether to
stop, one bool or one per row."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a row ended."""

    reason: FinishReason
    matched: str | int | None = None
    """The stop string, or the end token's id."""
    match: StopMatch | None = None
    """Where the stop string ends, for a text that is cut before it."""


class StoppingCriteria:
    """All criteria of a request, evaluated after each new token, in transformers' order.

    Args:
        config: The settings.
        tokenizer: For stop strings.
        prompts: Prompt ids of every row, padding excluded; a stop string may begin there.
        custom: The caller's criteria.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        *,
        tokenizer: Tokenizer | None,
        prompts: Sequence[IntArray],
        custom: Sequence[StoppingCriterion] = (),
    ) -> None:
        self._config = config
        self._custom = tuple(custom)
        self._eos = frozenset(config.eos_token_ids)
        self._started: float | None = None
        matchers = self._matchers(config, tokenizer)
        self._cursors = [
            [matcher.cursor(prompt.tolist()) for matcher in matchers] for prompt in prompts
        ]
        self._branches: list[list[StopStringCursor]] = []
        for criterion in self._custom:
            if not callable(criterion):
                raise RequestError(
                    f"a stopping criterion must be callable, got {type(criterion).__name__}",
                    param="stopping_criteria",
                )

    def start(self) -> None:
        """Let the time run that ``max_time`` limits: from the first step, not from the call."""
        self._started = time.monotonic()

    @staticmethod
    def _matchers(config: ResolvedConfig, tokenizer: Tokenizer | None) -> list[StopStringMatcher]:
        strings = [kind for kind in (config.stop_strings, config.stop) if kind]
        if tokenizer is None:
            return []
        return [StopStringMatcher(tokenizer, kind) for kind in strings]

    def check(
        self, ids: IntArray, scores: tuple[FloatArray, ...] | None, alive: Sequence[bool]
    ) -> list[Stop | None]:
        """Look at sequences that just got a token.

        Args:
            ids: Prompt and generated ids, [rows, length], padding included.
            scores: Processed scores of every step, [rows, V] each, if they are kept.
            alive: Which rows still run; a stop of the others is not looked for.

        Returns:
            For each row why it ends now, or None.

        Raises:
            RequestError: If a caller's criterion returns something else than bools.
        """
        return self._evaluate(ids, scores, alive, self._cursors)

    def branch(
        self, ids: IntArray, scores: tuple[FloatArray, ...] | None, parents: Sequence[int]
    ) -> list[Stop | None]:
        """Look at candidates, each a row with one more token, before some of them become rows.

        Args:
            ids: Prompt and generated ids of the candidates, [candidates, length].
            scores: As for `check`.
            parents: The row that each candidate continues.

        Returns:
            For each candidate why it would end here, or None.

        Raises:
            RequestError: If a caller's criterion returns something else than bools.
        """
        self._branches = [[c.copy() for c in self._cursors[parent]] for parent in parents]
        return self._evaluate(ids, scores, [True] * len(parents), self._branches)

    def keep(self, branches: Sequence[int]) -> None:
        """Make candidates of the last `branch` the rows, by their indices, in this order."""
        self._cursors = [self._branches[branch] for branch in branches]

    def _evaluate(
        self,
        ids: IntArray,
        scores: tuple[FloatArray, ...] | None,
        alive: Sequence[bool],
        cursors: Sequence[Sequence[StopStringCursor]],
    ) -> list[Stop | None]:
        config = self._config
        long = ids.shape[1] >= config.max_length
        late = False
        if config.max_time is not None and self._started is not None:
            late = time.monotonic() - self._started > config.max_time
        custom = self._ask(ids, scores)
        stops: list[Stop | None] = []
        for row, running in enumerate(alive):
            stops.append(None)
            if not running:
                continue
            token = int(ids[row, -1])
            match = next((m for c in cursors[row] if (m := c.push(token))), None)
            if match is not None:
                stops[row] = Stop("stop", match.stop_string, match)
            elif token in self._eos:
                stops[row] = Stop("stop", token)
            elif custom[row]:
                stops[row] = Stop("stop")
            elif long or late:
                stops[row] = Stop("length")
        return stops

    def _ask(self, ids: IntArray, scores: tuple[FloatArray, ...] | None) -> list[bool]:
        rows = ids.shape[0]
        verdict = np.zeros(rows, bool)
        for criterion in self._custom:
            answer = np.asarray(criterion(ids, scores))
            if answer.dtype != bool or answer.size not in (1, rows):
                raise RequestError(
                    f"a stopping criterion must return a bool or {rows} of them, got {answer!r}",
                    param="stopping_criteria",
                )
            verdict |= answer.reshape(-1)
        return verdict.tolist()
