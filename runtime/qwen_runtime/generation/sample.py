"""Greedy search and sampling, for one prompt or one padded batch.

Rows advance in lockstep, as in transformers: a step feeds one token to every row that still runs
and processors see all rows. Independent requests are separate state machines and don't wait for
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import Feed, FloatArray, IntArray, RowCopy, Step, TokenChoice
from qwen_runtime.generation.guidance import Guidance
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation.rows import RowState, TokenStreamer, make_generators, token_logprob
from qwen_runtime.generation.stopping import Stop, StoppingCriteria, StoppingCriterion
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling import (
    Candidates,
    LogitsProcessorList,
    ProcessorCallable,
    TokenSelector,
    TorchGenerator,
    build_logits_processors,
    sample,
)
from qwen_runtime.text import Tokenizer

__all__ = ["SampleDecoding"]


class SampleDecoding:
    """A `qwen_runtime.generation.base.Decoding` for greedy search and sampling.

    Args:
        prompts: One prompt, or a padded batch.
        config: The settings; ``num_return_sequences`` rows are made of every prompt.
        tokenizer: For stop strings.
        logits_processor: The caller's processors.
        stopping_criteria: The caller's criteria.
        prefix_allowed_tokens_fn: The caller's constraint; see transformers.
        structured: Mask of a structured output.
        streamer: Gets the prompt and every step's tokens.
        guidance: The unconditional logits, where the settings ask for guidance.
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
        self.config = config
        self._copies_per_prompt = config.num_return_sequences
        rows = prompts.expand(self._copies_per_prompt)
        self.rows = [RowState() for _ in rows.tokens]
        self.scores: list[FloatArray] = []
        self.logits: list[FloatArray] = []
        self._prompts = rows
        self._ids = np.empty((len(self.rows), config.max_length), np.int64)
        self._ids[:, : config.prompt_length] = rows.input_ids
        self._length = config.prompt_length
        self._held = [0] * len(self.rows)
        self._fed: list[int] = []
        self._finished = False
        self._vocab_size = 0
        self._streamer = streamer
        own = bool(logits_processor) or prefix_allowed_tokens_fn is not None
        several = len(self.rows) > 1
        # Rows that ended are still run (on pads) only where the caller sees them.
        self._run_ended = several and (own or config.output_scores or config.output_logits)
        self._stopping = StoppingCriteria(
            config, tokenizer=tokenizer, prompts=rows.tokens, custom=stopping_criteria
        )

        def processors(first: int, last: int) -> LogitsProcessorList:
            ignore = rows.ignore_lengths
            return build_logits_processors(
                config,
                prompt_ids=prompts.input_ids if own else rows.input_ids[first:last],
                prompt_ignore_length=None if ignore is None else ignore[first:last],
                custom=logits_processor,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                structured=structured,
                unconditional_logits=None if guidance is None else guidance.logits_of(first, last),
            )

        self._generators = make_generators(config, len(self.rows))
        self._joint = processors(0, len(self.rows)) if own and several else None
        self._selectors = (
            []
            if self._joint is not None
            else [
                TokenSelector(
                    processors(row, row + 1),
                    generator=self._generators[row] if self._generators else None,
                    return_scores=config.output_scores,
                )
                for row in range(len(self.rows))
            ]
        )

        # Otherwise somebody sees logits, or changes them in a way that is not known.
        self._may_choose = self._joint is None and not (config.output_logits or config.logprobs)
        self._choices: dict[int, TokenChoice] = {}
        self._survivors: dict[int, Candidates] = {}

    @property
    def num_rows(self) -> int:
        """See `Decoding.num_rows`."""
        return len(self.rows)

    @property
    def input_ids(self) -> IntArray:
        """Prompt and generated ids with padding, [rows, length]; a view."""
        return self._ids[:, : self._length]

    def prompt_tokens(self, row: int) -> IntArray:
        """Prompt ids of a row, without pads."""
        return self._prompts.tokens[row]

    def score_rows(self, row: int) -> list[int]:
        """See `Generation.score_rows`."""
        return [row] * max(len(self.scores), len(self.logits))

    @property
    def fed_tokens(self) -> Mapping[int, int]:
        """See `Guidable.fed_tokens`."""
        if self._length == self.config.prompt_length:
            return {}
        return {row: int(self._ids[row, self._length - 1]) for row in self._fed}

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return self._finished

    def next_step(self) -> Step:
        """See `Decoding.next_step`."""
        if self._length == self.config.prompt_length:
            return self._first_step()
        copies = []
        if self._length == self.config.prompt_length + 1:
            copies = [
                RowCopy(row - row % self._copies_per_prompt, row, self._held[row])
                for row in range(len(self.rows))
                if row % self._copies_per_prompt
            ]
        self._fed = [row for row in range(len(self.rows)) if self._runs(row)]
        feeds = []
        for row in self._fed:
            token = self._ids[row, self._length - 1 : self._length]
            choice = self._choice(row)
            if choice is not None:
                self._choices[row] = choice
            feeds.append(Feed(row, token, past=self._held[row], want=1, choice=choice))
            self._held[row] += 1
        return Step(tuple(feeds), tuple(copies))

    def accept(self, logits: Sequence[FloatArray]) -> None:
        """See `Decoding.accept`."""
        if self._finished:
            return
        by_row: list[FloatArray | None] = [None] * len(self.rows)
        first = self._length == self.config.prompt_length
        if first:
            self._check_vocabulary(logits[0].shape[-1])
        for row, values in zip(self._fed, logits, strict=True):
            for copy in range(self._copies_per_prompt if first else 1):
                by_row[row + copy] = values[-1]
        alive = [state.stop is None for state in self.rows]
        tokens = self._select(by_row)
        self._record(by_row, tokens, alive)
        if self.config.eos_token_ids:
            # Without an end token transformers never pads: an ended row goes on to the last one.
            pad = self.config.pad_token_id or 0
            tokens = [t if run else pad for t, run in zip(tokens, alive, strict=True)]
        self._ids[:, self._length] = tokens
        self._length += 1
        if self._streamer is not None:
            self._streamer.put(self._ids[:, self._length - 1 : self._length])
        scores = tuple(self.scores) if self.config.output_scores else None
        for row, stop in enumerate(self._stopping.check(self.input_ids, scores, alive)):
            if stop is not None:
                self.rows[row].stop = stop
        self._finish_if(all(state.stop is not None for state in self.rows))

    def _check_vocabulary(self, vocab_size: int) -> None:
        """Check, once the number of logits is known, what depends on it."""
        self._vocab_size = vocab_size
        pad = self.config.pad_token_id
        if self._run_ended and pad is not None and not 0 <= pad < vocab_size:
            raise RequestError(
                f"pad_token_id must be in 0..{vocab_size - 1} (the vocabulary) where ended rows "
                f"are run on, got {pad}; set another",
                param="pad_token_id",
            )

    def note_cached(self, row: int, num_tokens: int) -> None:
        """See `Decoding.note_cached`."""
        for state in self.rows[row : row + self._copies_per_prompt]:
            state.num_cached_tokens = num_tokens

    def cancel(self) -> None:
        """See `Decoding.cancel`."""
        for state in self.rows:
            state.stop = state.stop or Stop("cancelled")
        self._finish_if(True)

    def _first_step(self) -> Step:
        self._stopping.start()
        if self._streamer is not None:
            self._streamer.put(self.input_ids)
        self._fed = list(range(0, len(self.rows), self._copies_per_prompt))
        self._held = [len(tokens) for tokens in self._prompts.tokens]
        return Step(
            tuple(Feed(row, self._prompts.tokens[row], past=0, want=1) for row in self._fed)
        )

    def _choice(self, row: int) -> TokenChoice | None:
        """How a row's next token can be chosen without all of its logits, if it can."""
        if not self._may_choose:
            return None
        selector = self._selectors[row]
        if selector.takes_best:
            return TokenChoice()
        if selector.num_top is None:
            return None
        return TokenChoice(num_top=selector.num_top, take=partial(self._take, row))

    def _take(self, row: int, logits: FloatArray, tokens: IntArray) -> bool:
        """See `TokenChoice.take`. Rows draw later, in their order."""
        ids, vocab_size = self.input_ids[row], self._vocab_size
        survivors = self._selectors[row].shorten(ids, logits, tokens, vocab_size)
        if survivors is not None:
            self._survivors[row] = survivors
        return survivors is not None

    def _chosen(self, row: int) -> int:
        """The next token of a row whose logits were not needed.

        What an interrupted run of the step has left is not looked at where logits came after all.
        """
        token = self._choices[row].token
        return self._selectors[row].draw(self._survivors.pop(row)) if token is None else token

    def _runs(self, row: int) -> bool:
        return self.rows[row].stop is None or self._run_ended or not self.config.eos_token_ids

    def _select(self, by_row: Sequence[FloatArray | None]) -> list[int]:
        """The next token of every row; 0 for a row that does not run."""
        if self._joint is not None:
            logits = np.stack([self._present(values) for values in by_row])
            scores = self._joint(self.input_ids, logits)
            if self.config.output_scores:
                self.scores.append(scores)
            if self._generators is None:
                return [int(token) for token in scores.argmax(axis=-1)]
            return [
                int(sample(row, generator)[0])
                for row, generator in zip(scores, self._generators, strict=True)
            ]
        tokens, kept = [], []
        for row, values in enumerate(by_row):
            if values is None:
                self._skip_draw(row)
                tokens.append(0)
                continue
            if not values.size:
                tokens.append(self._chosen(row))
                continue
            token, scores_of_row = self._selectors[row].select(self.input_ids[row], values)
            tokens.append(token)
            if scores_of_row is not None:
                kept.append(scores_of_row)
        if self.config.output_scores:
            self.scores.append(np.stack(kept))
        return tokens

    def _record(
        self, by_row: Sequence[FloatArray | None], tokens: Sequence[int], alive: Sequence[bool]
    ) -> None:
        if self.config.output_logits:
            self.logits.append(np.stack([self._present(values) for values in by_row]))
        for state, values, token, running in zip(self.rows, by_row, tokens, alive, strict=True):
            if not running:
                continue
            state.token_ids.append(token)
            if self.config.logprobs:
                state.logprobs.append(
                    token_logprob(self._present(values), token, self.config.top_logprobs)
                )

    def _finish_if(self, done: bool) -> None:
        if done and not self._finished:
            self._finished = True
            if self._streamer is not None:
                self._streamer.end()

    def _skip_draw(self, row: int) -> None:
        """Pass the numbers that torch draws for ended rows too, from one generator."""
        generator = self._generators[row] if self._generators else None
        if isinstance(generator, TorchGenerator):
            generator.skip(self._vocab_size)

    @staticmethod
    def _present(values: FloatArray | None) -> FloatArray:
        if values is None:
            raise AssertionError("a row whose logits are needed was not run")
        return values
