"""Assisted generation: a draft model or the text itself proposes tokens, the model checks them.

::

    begin a round -> draft: one step of the draft model per candidate -> check: one call of the
                  -> lookup: candidates from the text               ->   model for all candidates
    accept the leading candidates that hold, and one token more -> next round
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import Feed, FloatArray, IntArray, Step
from qwen_runtime.generation.candidates import (
    AssistedStatistics,
    DraftLength,
    DraftSettings,
    accept_drawn,
    look_up,
    skip_draws,
)
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation.rows import RowState, TokenStreamer, token_logprob
from qwen_runtime.generation.stopping import Stop, StoppingCriteria, StoppingCriterion
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling import (
    LogitNormalization,
    LogitsProcessorList,
    ProcessorCallable,
    build_logits_processors,
    build_warpers,
    checked_probabilities,
    make_generator,
    sample,
    softmax,
)
from qwen_runtime.text import Tokenizer

__all__ = ["AssistedDecoding"]


class AssistedDecoding:
    """A `qwen_runtime.generation.rows.Generation` for greedy search and sampling with help.

    Args:
        prompts: One prompt.
        config: The settings.
        vocab_size: Number of logits, of both models.
        draft: How to use the draft model; None looks candidates up in the text.
        on_draft_length: Called at the end with the draft length that the schedule arrived at.
        tokenizer: For stop strings.
        logits_processor: The caller's processors.
        stopping_criteria: The caller's criteria.
        prefix_allowed_tokens_fn: The caller's constraint; see transformers.
        structured: Mask of a structured output.
        streamer: Gets the prompt and every round's tokens.

    Raises:
        RequestError: If there is more than one row.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        config: ResolvedConfig,
        *,
        vocab_size: int,
        draft: DraftSettings | None = None,
        on_draft_length: Callable[[int], None] | None = None,
        tokenizer: Tokenizer | None = None,
        logits_processor: Sequence[ProcessorCallable] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: Callable[[int, IntArray], Iterable[int]] | None = None,
        structured: ProcessorCallable | None = None,
        streamer: TokenStreamer | None = None,
    ) -> None:
        _require_one_row(prompts, config)
        self.config = config
        self.rows = [RowState()]
        self.scores: list[FloatArray] = []
        self.logits: list[FloatArray] = []
        self._prompts = prompts
        self._draft = draft
        self._draft_length = (
            DraftLength(config.prompt_lookup_num_tokens or 0, "constant")
            if draft is None
            else DraftLength(draft.num_assistant_tokens, draft.num_assistant_tokens_schedule)
        )
        self._on_draft_length = on_draft_length
        self._vocab_size = vocab_size
        self._length = config.prompt_length
        self._ids = np.empty((1, config.max_length), np.int64)
        self._ids[:, : self._length] = prompts.input_ids
        # Without pads: what the models are fed.
        self._num_pads = config.prompt_length - prompts.longest
        self._tokens = np.empty(config.max_length - self._num_pads, np.int64)
        self._tokens[: prompts.longest] = prompts.tokens[0]
        self._held = self._held_by_draft = 0
        self._num_wanted: int | None = None
        """Candidates still wanted in this round; None between rounds."""
        self._candidates: list[int] = []
        self._drafted: list[FloatArray] = []
        self._num_cut = 0
        """Candidates beyond max_length; transformers draws for them too."""
        self._drafted_total = self._accepted_total = self._calls = self._draft_calls = 0
        self._finished = False
        self._streamer = streamer
        self._stopping = StoppingCriteria(
            config, tokenizer=tokenizer, prompts=prompts.tokens, custom=stopping_criteria
        )
        self._processors = build_logits_processors(
            config,
            prompt_ids=prompts.input_ids,
            prompt_ignore_length=prompts.ignore_lengths,
            custom=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            structured=structured,
        )
        self._draft_processors = self._make_draft_processors()
        self._generator = make_generator(config.rng, config.seed) if config.do_sample else None

    @property
    def num_rows(self) -> int:
        """See `Decoding.num_rows`."""
        return 1

    @property
    def finished(self) -> bool:
        """Whether the row has ended."""
        return self._finished

    @property
    def input_ids(self) -> IntArray:
        """Prompt and generated ids with padding, [1, length]; a view."""
        return self._ids[:, : self._length]

    @property
    def statistics(self) -> AssistedStatistics:
        """What assistance saved so far."""
        return AssistedStatistics(
            self._drafted_total, self._accepted_total, self._calls, self._draft_calls
        )

    def prompt_tokens(self, row: int) -> IntArray:
        """Prompt ids, without pads."""
        return self._prompts.tokens[row]

    def score_rows(self, row: int) -> list[int]:
        """See `Generation.score_rows`."""
        return [row] * max(len(self.scores), len(self.logits))

    def next_step(self) -> Step:
        """See `Decoding.next_step`."""
        if self._num_wanted is None:
            self._begin_round()
        # In numbers of real tokens: what is decided, and what is proposed.
        known = self._length - self._num_pads
        end = known + len(self._candidates)
        if self._num_wanted:
            self._draft_calls += 1
            tokens = self._tokens[self._held_by_draft : end]
            feed = Feed(0, tokens, past=self._held_by_draft, want=1)
            self._held_by_draft = end
            return Step((feed,), on_draft=True)
        self._calls += 1
        want = len(self._candidates) + 1
        feed = Feed(0, self._tokens[self._held : end], past=self._held, want=want)
        self._held = end
        return Step((feed,))

    def accept(self, logits: Sequence[FloatArray]) -> None:
        """See `Decoding.accept`."""
        if self._finished:
            return
        if self._num_wanted:
            self._add_candidate(logits[0])
        else:
            self._check(logits[0])

    def note_cached(self, row: int, num_tokens: int) -> None:
        """See `Decoding.note_cached`."""
        self.rows[row].num_cached_tokens = num_tokens

    def cancel(self) -> None:
        """See `Decoding.cancel`."""
        self.rows[0].stop = self.rows[0].stop or Stop("cancelled")
        self._finish()

    def _begin_round(self) -> None:
        if self._length == self.config.prompt_length:
            self._stopping.start()
            if self._streamer is not None:
                self._streamer.put(self.input_ids)
        self._candidates, self._drafted = [], []
        # The check brings one token more than it is given.
        room = self.config.max_length - self._length - 1
        self._num_wanted = self._num_cut = 0
        if self._draft is not None:
            known = self._length - self._num_pads
            room = min(room, self._draft.max_context - known + 1)
            self._num_wanted = max(0, min(room, self._draft_length.value))
        elif room > 0:
            guess = look_up(
                self._ids[0, : self._length],
                self._draft_length.value,
                self.config.max_matching_ngram_size,
                eos_token_ids=self.config.eos_token_ids,
                vocab_size=self._vocab_size,
                processors=self._draft_processors,
            )
            for token in guess[:room].tolist():
                self._propose(token)
            self._num_cut = max(0, len(guess) - room)

    def _propose(self, token: int) -> None:
        place = self._length + len(self._candidates)
        self._ids[0, place] = self._tokens[place - self._num_pads] = token
        self._candidates.append(token)

    def _add_candidate(self, logits: FloatArray) -> None:
        """Take the draft model's logits of one position, [1, V]."""
        if self._draft is None or self._num_wanted is None:
            raise AssertionError("there is no draft model")
        place = self._length + len(self._candidates)
        scores = self._draft_processors(self._ids[:, :place], logits)[0]
        token = self._select(scores)
        probabilities = softmax(scores)
        self._drafted.append(probabilities)
        self._propose(token)
        self._num_wanted -= 1
        unsure = probabilities[token] < self._draft.assistant_confidence_threshold
        if unsure or token in self.config.eos_token_ids:
            self._num_wanted = 0

    def _check(self, logits: FloatArray) -> None:
        """Take the model's logits of all candidates and one position more, [n + 1, V]."""
        scores: list[FloatArray] = []

        def score(position: int) -> FloatArray:
            ids = self._ids[:, : self._length + position]
            scores.append(self._processors(ids, logits[position : position + 1])[0])
            return scores[-1]

        block = self._choose(score)
        if self._generator is not None:
            skip_draws(self._generator, self._num_cut, self._vocab_size)
        num_added = self._append(block, scores, logits)
        self._drafted_total += len(self._candidates)
        self._accepted_total += min(num_added, len(block) - 1)
        self._draft_length.update(all_accepted=num_added == len(self._candidates) + 1)
        # The last token is not in the caches, candidates that were refused are to be forgotten.
        self._held = self._length - self._num_pads - 1
        self._held_by_draft = min(self._held_by_draft, self._held)
        self._num_wanted = None
        if self.rows[0].stop is not None:
            self._finish()

    def _choose(self, score: Callable[[int], FloatArray]) -> list[int]:
        """The leading candidates that hold, and one token more."""
        candidates, weight = self._candidates, self.config.assistant_ensemble_weight
        if self._generator is not None and self._drafted:
            return accept_drawn(
                candidates,
                self._drafted,
                lambda position: checked_probabilities(score(position)),
                self._generator,
                weight,
            )
        for position, candidate in enumerate(candidates):
            scores = score(position)
            if weight is not None and self._drafted:
                scores = weight * softmax(scores) + (1 - weight) * self._drafted[position]
            token = self._select(scores)
            if token != candidate:
                if self._generator is not None:
                    rest = len(candidates) - position
                    skip_draws(self._generator, rest, self._vocab_size)
                return [*candidates[:position], token]
        return [*candidates, self._select(score(len(candidates)))]

    def _select(self, scores: FloatArray) -> int:
        if self._generator is None:
            return int(scores.argmax())
        return int(sample(scores, self._generator)[0])

    def _append(
        self, block: Sequence[int], scores: Sequence[FloatArray], logits: FloatArray
    ) -> int:
        """Add tokens up to the one that ends the row; returns how many were added.

        A row ends where plain decoding would end it, also inside a block.
        """
        state, config, start = self.rows[0], self.config, self._length
        for position, token in enumerate(block):
            self._ids[0, self._length] = self._tokens[self._length - self._num_pads] = token
            self._length += 1
            state.token_ids.append(token)
            if config.output_scores:
                self.scores.append(scores[position][None].copy())
            if config.output_logits:
                self.logits.append(logits[position : position + 1].copy())
            if config.logprobs:
                state.logprobs.append(token_logprob(logits[position], token, config.top_logprobs))
            kept = tuple(self.scores) if config.output_scores else None
            state.stop = self._stopping.check(self.input_ids, kept, [True])[0]
            if state.stop is not None:
                break
        if self._streamer is not None:
            self._streamer.put(self._ids[:, start : self._length])
        return self._length - start

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        if self._on_draft_length is not None:
            self._on_draft_length(self._draft_length.value)
        if self._streamer is not None:
            self._streamer.end()

    def _make_draft_processors(self) -> LogitsProcessorList:
        """The processors of candidates."""
        warpers = build_warpers(self.config)
        normalization = [LogitNormalization()] if self.config.renormalize_logits else []
        if self._draft is None:
            # Only what forbids tokens matters; warpers come last.
            count = len(self._processors) - len(warpers) - len(normalization)
            return LogitsProcessorList(self._processors[:count])
        if self.config.rng == "torch":
            # transformers warps a draft twice: its token for token equal needs the same.
            return LogitsProcessorList([*self._processors, *warpers, *normalization])
        return self._processors


def _require_one_row(prompts: PromptBatch, config: ResolvedConfig) -> None:
    if len(prompts.tokens) > 1:
        raise RequestError(
            f"assisted generation takes one row, got a batch of {len(prompts.tokens)}; pass a "
            "list of prompts, or leave out assistant_model and prompt_lookup_num_tokens",
            param="input_ids",
        )
    if config.num_return_sequences > 1:
        raise RequestError(
            "num_return_sequences must be 1 in assisted generation, got "
            f"{config.num_return_sequences}; leave out assistant_model",
            param="num_return_sequences",
        )
