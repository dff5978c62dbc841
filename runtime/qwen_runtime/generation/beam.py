"""Beam search and beam sampling, for one prompt or one padded batch.

A beam that goes on stays in its cache row. Where a beam forks, the other branches are copied into
rows of beams that died; so what is copied from is never overwritten, and only what moved is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import Feed, FloatArray, IntArray, RowCopy, Step
from qwen_runtime.generation.guidance import Guidance
from qwen_runtime.generation.hypotheses import Hypotheses
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation.rows import (
    RowState,
    TokenLogprob,
    TokenStreamer,
    make_generators,
    token_logprob,
)
from qwen_runtime.generation.stopping import Stop, StoppingCriteria, StoppingCriterion
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling import (
    ProcessorCallable,
    build_logits_processors,
    checked_probabilities,
    log_softmax,
)
from qwen_runtime.sampling.numerics import largest_first
from qwen_runtime.text import Tokenizer

__all__ = ["BeamDecoding"]


class BeamDecoding:
    """A `qwen_runtime.generation.rows.Generation` for beam search and beam sampling.

    Args:
        prompts: One prompt, or a padded batch.
        config: The settings; ``num_beams`` > 1.
        tokenizer: For stop strings.
        logits_processor: The caller's processors.
        stopping_criteria: The caller's criteria; they see the candidates of every step.
        prefix_allowed_tokens_fn: The caller's constraint; see transformers.
        structured: Mask of a structured output.
        streamer: Must be None: which tokens are returned is known only at the end.
        guidance: The unconditional logits, where the settings ask for guidance.

    Raises:
        RequestError: If there is a streamer.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        config: ResolvedConfig,
        *,
        tokenizer: Tokenizer | None = None,
        logits_processor: Sequence[ProcessorCallable] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: Callable[[int, IntArray], Iterable[int]] | None = None,
        structured: ProcessorCallable | None = None,
        streamer: TokenStreamer | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        if streamer is not None:
            raise RequestError(
                f"a streamer needs num_beams=1, got {config.num_beams}; a beam search knows its "
                "tokens only at the end",
                param="streamer",
            )
        self.config = config
        self.rows = [RowState() for _ in range(len(prompts.tokens) * config.num_return_sequences)]
        self.scores: list[FloatArray] = []
        self.logits: list[FloatArray] = []
        self._prompts = prompts
        self._hypotheses = Hypotheses(prompts.input_ids, config)
        self._num_candidates = max(2, 1 + len(config.eos_token_ids)) * config.num_beams
        # All beams of a prompt begin in one row.
        self._cache_rows = np.repeat(
            np.arange(len(prompts.tokens)) * config.num_beams, config.num_beams
        )
        self._held = [0] * len(prompts.tokens)
        self._copies: tuple[RowCopy, ...] = ()
        self._fed_beams: IntArray = np.empty(0, np.int64)
        self._logprobs: list[dict[tuple[int, int], TokenLogprob]] = []
        self._finished = False
        self._result = self._hypotheses.result(config.num_return_sequences)
        expanded = prompts.expand(config.num_beams)
        self._stopping = StoppingCriteria(
            config, tokenizer=tokenizer, prompts=expanded.tokens, custom=stopping_criteria
        )
        self._processors = build_logits_processors(
            config,
            prompt_ids=prompts.input_ids,
            prompt_ignore_length=expanded.ignore_lengths,
            custom=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            structured=structured,
            unconditional_logits=None
            if guidance is None
            else guidance.logits_of(0, self.num_rows),
        )
        self._generators = make_generators(config, len(prompts.tokens))

    @property
    def num_rows(self) -> int:
        """See `Decoding.num_rows`."""
        return len(self._cache_rows)

    @property
    def finished(self) -> bool:
        """Whether the search is over."""
        return self._finished

    @property
    def input_ids(self) -> IntArray:
        """The best sequences of every prompt, [prompts * num_return_sequences, length]."""
        return self._result[0]

    @property
    def sequences_scores(self) -> FloatArray:
        """Their scores, normalised by length, [prompts * num_return_sequences]."""
        return self._result[1]

    @property
    def beam_indices(self) -> npt.NDArray[np.int32]:
        """For every generated token the row of ``scores`` it came from, -1 after the end."""
        return self._result[2]

    def prompt_tokens(self, row: int) -> IntArray:
        """Prompt ids of a returned row, without pads."""
        return self._prompts.tokens[row // self.config.num_return_sequences]

    def score_rows(self, row: int) -> list[int]:
        """See `Generation.score_rows`."""
        return [int(beam) for beam in self.beam_indices[row] if beam >= 0]

    @property
    def fed_tokens(self) -> Mapping[int, int]:
        """See `Guidable.fed_tokens`."""
        if self._hypotheses.length == self.config.prompt_length:
            return {}
        return dict(enumerate(self._hypotheses.newest_tokens.tolist()))

    def next_step(self) -> Step:
        """See `Decoding.next_step`."""
        beams = self.config.num_beams
        if self._hypotheses.length == self.config.prompt_length:
            self._stopping.start()
            self._held = [len(tokens) for tokens in self._prompts.tokens]
            feeds = [
                Feed(item * beams, tokens, past=0, want=1)
                for item, tokens in enumerate(self._prompts.tokens)
            ]
            return Step(tuple(feeds))
        newest = self._hypotheses.newest_tokens
        # In the order of cache rows, which lie side by side: one call without gathering.
        self._fed_beams = np.argsort(self._cache_rows)
        feeds = [
            Feed(
                int(self._cache_rows[beam]),
                newest[beam : beam + 1],
                past=self._held[beam // beams],
                want=1,
            )
            for beam in self._fed_beams.tolist()
        ]
        self._held = [held + 1 for held in self._held]
        return Step(tuple(feeds), self._copies)

    def accept(self, logits: Sequence[FloatArray]) -> None:
        """See `Decoding.accept`."""
        if self._finished:
            return
        if self._hypotheses.length == self.config.prompt_length:
            rows = np.repeat(np.stack([v[-1] for v in logits]), self.config.num_beams, axis=0)
        else:
            rows = np.empty((self.num_rows, logits[0].shape[-1]), np.float32)
            for beam, values in zip(self._fed_beams.tolist(), logits, strict=True):
                rows[beam] = values[-1]
        scores = log_softmax(rows)
        if self._processors:
            scores = self._processors(self._hypotheses.running_ids, scores)
        if self.config.output_logits:
            self.logits.append(rows)
        if self.config.output_scores:
            self.scores.append(scores)
        if self.config.logprobs:
            self._logprobs.append({})

        def judge(ids: IntArray, parents: IntArray) -> list[Stop | None]:
            if self.config.logprobs:
                self._note_logprobs(rows, parents.tolist(), ids[:, -1].tolist())
            kept = tuple(self.scores) if self.config.output_scores else None
            return self._stopping.branch(ids, kept, parents.tolist())

        parents, candidates, over = self._hypotheses.extend(scores, self._pick, judge)
        if over:
            self._finish()
            return
        self._stopping.keep(candidates.tolist())
        self._copies = self._move(parents.tolist())

    def note_cached(self, row: int, num_tokens: int) -> None:
        """See `Decoding.note_cached`."""
        returned = self.config.num_return_sequences
        first = row // self.config.num_beams * returned
        for state in self.rows[first : first + returned]:
            state.num_cached_tokens = num_tokens

    def cancel(self) -> None:
        """Finish now, with the beams that run in the places that none has finished for."""
        if not self._finished:
            self._hypotheses.finish_running(Stop("cancelled"))
            self._finish()

    def _pick(self, item: int, totals: FloatArray) -> IntArray:
        """Candidates of one prompt: the best ones, or drawn ones in the order of drawing."""
        count = min(self._num_candidates, totals.shape[0])
        if self._generators is None:
            return largest_first(totals, count)
        return self._generators[item].multinomial(checked_probabilities(totals), count)

    def _move(self, parents: Sequence[int]) -> tuple[RowCopy, ...]:
        """Give the new beams their cache rows; returns what has to be copied."""
        beams = self.config.num_beams
        origins = self._cache_rows[list(parents)].tolist()
        copies = []
        for item, held in enumerate(self._held):
            first = item * beams
            taken = set(origins[first : first + beams])
            free = iter([row for row in range(first, first + beams) if row not in taken])
            for beam in range(first, first + beams):
                row = origins[beam]
                if row in taken:
                    taken.remove(row)
                else:
                    row = next(free)
                    copies.append(RowCopy(origins[beam], row, held))
                self._cache_rows[beam] = row
        return tuple(copies)

    def _note_logprobs(
        self, logits: FloatArray, beams: Sequence[int], tokens: Sequence[int]
    ) -> None:
        for beam, token in zip(beams, tokens, strict=True):
            self._logprobs[-1][beam, token] = token_logprob(
                logits[beam], token, self.config.top_logprobs
            )

    def _finish(self) -> None:
        self._finished = True
        self._result = self._hypotheses.result(self.config.num_return_sequences)
        ids, _, trace, stops = self._result
        for row, state in enumerate(self.rows):
            generated = int((trace[row] >= 0).sum())
            start = self.config.prompt_length
            state.token_ids = ids[row, start : start + generated].tolist()
            state.stop = stops[row] or Stop("length")
            if self.config.logprobs:
                sources = zip(self._logprobs, self.score_rows(row), state.token_ids, strict=False)
                state.logprobs = [noted[beam, token] for noted, beam, token in sources]
