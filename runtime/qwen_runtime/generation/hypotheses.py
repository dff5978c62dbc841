"""The bookkeeping of a beam search: which sequences run, which are finished, when it is over.

Everything is an array [items, beams, ...]: an item is a prompt. Arithmetic is float32 in the
order of transformers 5.23 (``GenerationMixin._beam_search``), so that equal scores stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from qwen_runtime.generation.base import FloatArray, IntArray
from qwen_runtime.generation.stopping import Stop
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling.numerics import largest_first

__all__ = ["Hypotheses"]

_NEVER = np.float32(-1e9)
"""Added to the score of what must not be chosen; small enough to lose, large enough to add up."""


class Hypotheses:
    """Running and finished sequences of a beam search.

    Args:
        prompt_ids: Prompts with padding, [items, prompt length].
        config: The settings.
    """

    def __init__(self, prompt_ids: IntArray, config: ResolvedConfig) -> None:
        items, beams = prompt_ids.shape[0], config.num_beams
        self._config = config
        self._prompt_length = config.prompt_length
        self._item = np.arange(items)[:, None]
        self.length = config.prompt_length
        """Tokens of every running sequence, prompt and padding included."""
        # A pad token 0 counts as none here, as in transformers.
        fill = (config.pad_token_id or config.eos_token_ids[0]) if config.eos_token_ids else -1
        self._ids = np.full((items, beams, config.max_length), fill, np.int64)
        self._ids[:, :, : self.length] = prompt_ids[:, None]
        self._scores = np.full((items, beams), _NEVER, np.float32)
        self._scores[:, 0] = 0  # all beams are equal at first: only one may be continued
        self._trace = np.full((items, beams, config.max_new_tokens), -1, np.int32)
        self._finished_ids = self._ids.copy()
        self._finished_scores = np.full((items, beams), _NEVER, np.float32)
        self._finished_trace = self._trace.copy()
        self._is_finished = np.zeros((items, beams), bool)
        self._stops: list[list[Stop | None]] = [[None] * beams for _ in range(items)]
        self._can_improve = np.ones((items, 1), bool)

    @property
    def running_ids(self) -> IntArray:
        """Sequences that run, [items * beams, length]."""
        beams = self._ids.shape[:2]
        return self._ids[:, :, : self.length].reshape(beams[0] * beams[1], self.length)

    @property
    def newest_tokens(self) -> IntArray:
        """The last token of every running sequence, [items * beams]."""
        return self._ids[:, :, self.length - 1].reshape(-1)

    def extend(
        self,
        scores: FloatArray,
        pick: Callable[[int, FloatArray], IntArray],
        judge: Callable[[IntArray, IntArray], Sequence[Stop | None]],
    ) -> tuple[IntArray, IntArray, bool]:
        """Continue every item by one token.

        Args:
            scores: Processed log-probabilities of the next token, [items * beams, V].
            pick: Called with an item and its totals, [beams * V]; returns the candidates, indices
                into them, [candidates], more than beams.
            judge: Called with the candidates' ids, [items * candidates, length + 1], and the flat
                index of the beam that each continues; returns why each stops.

        Returns:
            Of the beams that run now, [items * beams] each: the flat index of the beam they
            continue, and their index among all candidates; and whether the search is over.
        """
        items, beams = self._scores.shape
        vocab_size = scores.shape[-1]
        totals = scores.reshape(items, beams, vocab_size) + self._scores[:, :, None]
        totals = totals.reshape(items, beams * vocab_size)
        chosen = np.stack([pick(item, row) for item, row in enumerate(totals)])
        values = np.take_along_axis(totals, chosen, axis=1)
        parents, tokens = np.divmod(chosen, vocab_size)
        flat_parents = parents + self._item * beams
        step = self.length - self._prompt_length
        ids = self._ids[self._item, parents, : self.length + 1]
        ids[:, :, -1] = tokens
        trace = self._trace[self._item, parents, : step + 1]
        trace[:, :, -1] = flat_parents
        stops = judge(ids.reshape(chosen.size, -1), flat_parents.reshape(-1))
        hit = np.array([stop is not None for stop in stops]).reshape(chosen.shape)

        running = _barred(values, hit)
        best = _best(running, beams)
        self._scores = np.take_along_axis(running, best, axis=1)
        self._ids[:, :, : self.length + 1] = ids[self._item, best]
        self._trace[:, :, : step + 1] = trace[self._item, best]
        self._finish(ids, trace, values, hit, stops)
        self.length += 1
        over = self._is_over(hit)
        candidates = best + self._item * chosen.shape[1]
        return flat_parents[self._item, best].reshape(-1), candidates.reshape(-1), over

    def finish_running(self, stop: Stop) -> None:
        """Let running sequences take the places that no finished one has."""
        items, beams = self._scores.shape
        divisor = self._divisor(max(1, self.length - self._prompt_length))
        for item in range(items):
            free = np.flatnonzero(~self._is_finished[item])
            for place, beam in zip(free, range(beams), strict=False):
                self._finished_ids[item, place] = self._ids[item, beam]
                self._finished_trace[item, place] = self._trace[item, beam]
                self._finished_scores[item, place] = self._scores[item, beam] / divisor
                self._stops[item][place] = stop
            order = np.argsort(-self._finished_scores[item], kind="stable")
            for array in (self._finished_ids, self._finished_trace, self._finished_scores):
                array[item] = array[item][order]
            self._stops[item] = [self._stops[item][place] for place in order]

    def result(
        self, count: int
    ) -> tuple[IntArray, FloatArray, npt.NDArray[np.int32], list[Stop | None]]:
        """The best sequences of every item, best first.

        Args:
            count: Sequences of each item.

        Returns:
            Ids, [items * count, length], shorter ones filled up; scores by length,
            [items * count]; for every generated token the flat beam it came from,
            [items * count, generated], -1 after the end; and why each ended, None where the
            search was over before it was.
        """
        rows = self._ids.shape[0] * count
        trace = self._finished_trace[:, :count].reshape(rows, -1)
        generated = int((trace >= 0).sum(axis=1).max())
        ids = self._finished_ids[:, :count].reshape(rows, -1)
        return (
            ids[:, : self._prompt_length + generated],
            self._finished_scores[:, :count].reshape(rows),
            trace[:, :generated],
            [stop for stops in self._stops for stop in stops[:count]],
        )

    def _finish(
        self,
        ids: IntArray,
        trace: npt.NDArray[np.int32],
        values: FloatArray,
        hit: npt.NDArray[np.bool_],
        stops: Sequence[Stop | None],
    ) -> None:
        """Let candidates that stop compete with the finished sequences."""
        config, beams = self._config, self._scores.shape[1]
        # Candidates beyond the first ``beams`` only stand by, to keep that many running.
        ends = hit & (np.arange(hit.shape[1]) < beams)
        if not ends.any():
            return
        generated = self.length + 1 - self._prompt_length
        scores = values / self._divisor(generated)
        if config.early_stopping is True:
            full = np.asarray(self._is_finished.all(axis=1))[:, None]
            scores = _barred(scores, full)
        scores = _barred(_barred(scores, ~self._can_improve), ~ends)
        scores = np.concatenate([self._finished_scores, scores], axis=1)
        best = _best(scores, beams)
        self._finished_scores = np.take_along_axis(scores, best, axis=1)
        done = np.concatenate([self._is_finished, ends], axis=1)
        self._is_finished = np.take_along_axis(done, best, axis=1)
        # Nothing finished so far is longer than the candidates.
        length = self.length + 1
        merged = np.concatenate([self._finished_ids[:, :, :length], ids], axis=1)
        self._finished_ids[:, :, :length] = merged[self._item, best]
        traces = np.concatenate([self._finished_trace[:, :, :generated], trace], axis=1)
        self._finished_trace[:, :, :generated] = traces[self._item, best]
        for item, places in enumerate(best.tolist()):
            new = stops[item * hit.shape[1] : (item + 1) * hit.shape[1]]
            both = [*self._stops[item], *new]
            self._stops[item] = [both[place] for place in places]

    def _is_over(self, hit: npt.NDArray[np.bool_]) -> bool:
        config = self._config
        reached = self.length - self._prompt_length
        if config.early_stopping == "never" and config.length_penalty > 0:
            reached = config.max_new_tokens
        possible = self._scores[:, :1] / self._divisor(reached)
        worst = self._finished_scores.min(axis=1, keepdims=True)
        worst = np.where(self._is_finished, worst, _NEVER)
        self._can_improve &= (possible > worst).any(axis=1, keepdims=True)
        complete = config.early_stopping is True and bool(self._is_finished.all())
        return not self._can_improve.any() or complete or bool(hit.all())

    def _divisor(self, generated: int) -> np.float32:
        with np.errstate(over="ignore"):
            return np.float32(np.float64(generated) ** self._config.length_penalty)


def _barred(scores: FloatArray, barred: npt.NDArray[np.bool_]) -> FloatArray:
    return scores + barred.astype(np.float32) * _NEVER


def _best(scores: FloatArray, count: int) -> IntArray:
    """Positions of the largest scores of every row, largest first, [rows, count]."""
    return np.stack([largest_first(row, count) for row in scores])
