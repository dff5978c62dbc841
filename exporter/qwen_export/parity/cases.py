"""The bundle's side: every way a caller can make it produce the same logits.

Greedy tokens come from the portable prefill graph; the decode graph and the graph for the CPU,
which serves both phases there, are then given the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwen_export.parity.case_table import (
    GREEDY_DECODE,
    GREEDY_PREFILL,
    LOWERED_COPIED,
    LOWERED_GREEDY,
    LOWERED_WHOLE,
    OFF_BY_ONE,
    PREFILL_COPIED,
    PREFILL_WHOLE,
    SERVED,
)
from qwen_export.parity.observations import Observations
from qwen_export.parity.prompts import Prompt
from qwen_runtime.backends.base import FloatArray, IntArray, ModelRunner

__all__ = [
    "Invariant",
    "decode_cases",
    "lowered_cases",
    "prefill_cases",
    "served_cases",
]

MAX_WANTED = 48
"""Last positions of a prompt whose logits are compared; all of them where it is shorter."""
WANTED_PER_CHUNK = 4
"""The same for the chunks of a prompt longer than `MAX_WANTED`, but the last one."""
BATCH_TOKENS = 8
"""Tokens of every row in the equal-length batch."""
FEW_STEPS = 8
"""Greedy steps of the cases that repeat one row."""
GROWTH = 256
"""Tokens by which the capacity is raised in the middle of an answer."""


ONE_TOKEN = "one token: a row in a batch = the row alone"
GROWN = "decode: before growth = after growth"
COPIED = "prefill: after a copied prefix = whole"
AS_SERVED = "as served, "
"""Begins the names of invariants of int8 activations."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """Two ways of running the same tokens that should give the same bits."""

    name: str
    bit_equal: bool
    difference: float
    """max|difference| of any logit."""


Advance = Callable[[int], None]


def prefill_cases(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    seen: Observations,
    advance: Advance,
    *,
    greedy: str = GREEDY_PREFILL,
) -> tuple[list[IntArray], list[Invariant]]:
    """Run everything the prefill graph can do.

    Args:
        runner: Serves both phases with the prefill graph, or decodes with a graph of its own.
        prompts: One slot each.
        seen: Takes the logits.
        advance: Called with 1 after each case.
        greedy: The case that greedy tokens are of: `GREEDY_DECODE` where another graph decodes.

    Returns:
        Greedy tokens of each prompt, ``prompt.steps`` of them, and the invariants.
    """
    longest = max(range(len(prompts)), key=lambda i: _wanted_whole(prompts[i]))
    _prefill_whole(runner, prompts, seen)
    advance(1)
    last = _prefill_ragged(runner, prompts, seen)
    batch = _Keep()
    tokens = _decode(runner, prompts, last, greedy, seen, keep=batch)
    answer = tokens[longest][:FEW_STEPS]
    together = batch.rows(longest)[: len(answer)]
    alone = _replay(runner, prompts[longest], answer)
    advance(1)
    _prefill_chunks(runner, prompts, seen)
    advance(1)
    invariants = _prefill_batch(runner, prompts, seen)
    invariants.append(_invariant(ONE_TOKEN, together, alone))
    _prefill_copied(runner, longest, prompts, seen)
    advance(1)
    return tokens, invariants


def decode_cases(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    tokens: Sequence[IntArray],
    control: int,
    seen: Observations,
    advance: Advance,
    *,
    batch: bool = True,
) -> list[Invariant]:
    """Run everything the decode graph can do, and the decode that must fail.

    Args:
        runner: Serves decode with the decode graph.
        prompts: One slot each.
        tokens: Greedy tokens of each prompt, to be fed again.
        control: Index of the prompt whose past is shifted on purpose.
        seen: Takes the logits; those of the control under `OFF_BY_ONE`.
        advance: Called with 1 after each case.
        batch: Run all prompts as one batch, which is done already where this runner chose the
            tokens.

    Returns:
        The invariants.
    """
    if batch:
        count = len(prompts)
        runner.allocate(count, 1)
        runner.prefill(range(count), [p.tokens for p in prompts], [0] * count, [0] * count)
        _decode(runner, prompts, None, GREEDY_DECODE, seen, feed=tokens)
        advance(1)
    prompt, answer = prompts[control], tokens[control][:FEW_STEPS]
    alone = _replay(runner, prompt, answer)
    _add(seen, "greedy decode, one row", control, len(prompt.tokens), alone)
    invariants = []
    grown = _grown(runner, prompt, answer)
    if grown is not None:
        _add(seen, "greedy decode, growing", control, len(prompt.tokens), grown)
        invariants.append(_invariant(GROWN, grown, alone))
    shifted = _replay(runner, prompt, answer, past=len(prompt.tokens) - 1)
    _add(seen, OFF_BY_ONE, control, len(prompt.tokens), shifted)
    advance(1)
    return invariants


def lowered_cases(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    tokens: Sequence[IntArray],
    seen: Observations,
    advance: Advance,
) -> None:
    """Run what the graph for the CPU does otherwise than the portable one it was made from.

    Batches of several rows and chunks are looked at where it serves, in `served_cases`.

    Args:
        runner: Serves both phases with that graph and fp32 activations.
        prompts: One slot each.
        tokens: The answer to each prompt, to be fed again.
        seen: Takes the logits, under `LOWERED_CASES`.
        advance: Called with 1 after each case.
    """
    longest = max(range(len(prompts)), key=lambda i: _wanted_whole(prompts[i]))
    _prefill_whole(runner, prompts, seen, LOWERED_WHOLE)
    advance(1)
    _decode(runner, prompts, None, LOWERED_GREEDY, seen, feed=tokens)
    advance(1)
    _prefill_copied(runner, longest, prompts, seen, LOWERED_COPIED)
    advance(1)


def served_cases(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    tokens: Sequence[IntArray],
    seen: Observations,
    advance: Advance,
) -> list[Invariant]:
    """Run a quantised bundle the way it is served, over prompts and answers.

    Args:
        runner: Serves both phases with one graph and int8 activations.
        prompts: One slot each.
        tokens: The answer to each prompt, to be fed again.
        seen: Takes the logits, under `SERVED`.
        advance: Called with 1 after each case.

    Returns:
        The invariants.
    """
    longest = max(range(len(prompts)), key=lambda i: _wanted_whole(prompts[i]))
    _prefill_whole(runner, prompts, seen, SERVED)
    advance(1)
    batch = _Keep()
    _decode(runner, prompts, None, SERVED, seen, feed=tokens, keep=batch)
    answer = tokens[longest][:FEW_STEPS]
    together = batch.rows(longest)[: len(answer)]
    alone = _replay(runner, prompts[longest], answer)
    invariants = _prefill_batch(runner, prompts, None)
    invariants.append(_invariant(ONE_TOKEN, together, alone))
    copied = _copied(runner, longest, prompts)
    if copied is not None:
        (whole,) = runner.prefill([0], [prompts[longest].tokens], [0], [len(copied)])
        invariants.append(_invariant(COPIED, copied, whole))
    grown = _grown(runner, prompts[longest], answer)
    if grown is not None:
        invariants.append(_invariant(GROWN, grown, alone))
    advance(1)
    return [replace(item, name=AS_SERVED + item.name) for item in invariants]


def _wanted_whole(prompt: Prompt) -> int:
    return min(len(prompt.tokens), MAX_WANTED)


def _add(seen: Observations, case: str, row: int, first: int, logits: FloatArray) -> None:
    seen.add(case, row, range(first, first + len(logits)), logits)


def _prefill_whole(
    runner: ModelRunner, prompts: Sequence[Prompt], seen: Observations, case: str = PREFILL_WHOLE
) -> None:
    runner.allocate(len(prompts) + 1, 1)
    for slot, prompt in enumerate(prompts):
        want = _wanted_whole(prompt)
        (logits,) = runner.prefill([slot], [prompt.tokens], [0], [want])
        _add(seen, case, slot, len(prompt.tokens) - want, logits)


def _prefill_ragged(
    runner: ModelRunner, prompts: Sequence[Prompt], seen: Observations
) -> list[FloatArray]:
    slots = range(len(prompts))
    want = [1] * len(prompts)
    last = runner.prefill(slots, [p.tokens for p in prompts], [0] * len(prompts), want)
    for slot, logits in enumerate(last):
        _add(seen, "prefill ragged", slot, len(prompts[slot].tokens) - 1, logits)
    return last


def _prefill_chunks(runner: ModelRunner, prompts: Sequence[Prompt], seen: Observations) -> None:
    for row, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        short = length <= MAX_WANTED
        size = 5 if short else 96
        if length <= size:
            continue
        for past in range(0, length, size):
            chunk = prompt.tokens[past : past + size]
            inner = not short and past + size < length
            want = min(len(chunk), WANTED_PER_CHUNK if inner else MAX_WANTED)
            (logits,) = runner.prefill([row], [chunk], [past], [want])
            first = past + len(chunk) - want
            _add(seen, f"prefill in chunks of {size}", row, first, logits)


def _prefill_batch(
    runner: ModelRunner, prompts: Sequence[Prompt], seen: Observations | None
) -> list[Invariant]:
    """Rows together and one by one; without ``seen`` only to compare the two."""
    length = min(BATCH_TOKENS, max(len(prompt.tokens) for prompt in prompts))
    rows = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) >= length]
    heads = [prompts[row].tokens[:length] for row in rows]
    n = len(rows)
    together = runner.prefill(range(n), heads, [0] * n, [length] * n)
    alone = [runner.prefill([0], [head], [0], [length])[0] for head in heads]
    for row, batched, single in zip(rows, together, alone, strict=True):
        if seen is None:
            continue
        _add(seen, "prefill batch", row, 0, batched)
        _add(seen, "prefill batch, row by row", row, 0, single)
    name = f"prefill: a batch of {n} = {n} batches of one"
    return [_invariant(name, np.concatenate(together), np.concatenate(alone))]


def _prefill_copied(
    runner: ModelRunner,
    row: int,
    prompts: Sequence[Prompt],
    seen: Observations,
    case: str = PREFILL_COPIED,
) -> None:
    logits = _copied(runner, row, prompts)
    if logits is not None:
        first = len(prompts[row].tokens) - len(logits)
        _add(seen, case, row, first, logits)


def _copied(runner: ModelRunner, row: int, prompts: Sequence[Prompt]) -> FloatArray | None:
    """The last logits of a prompt whose first half another slot had; None for one token."""
    tokens, spare = prompts[row].tokens, len(prompts)
    half = len(tokens) // 2
    if not half:
        return None
    runner.prefill([row], [tokens], [0], [0])
    runner.copy(row, spare, half)
    want = min(len(tokens) - half, MAX_WANTED)
    (logits,) = runner.prefill([spare], [tokens[half:]], [half], [want])
    return logits


class _Keep:
    """The logits of a batch's steps, by row."""

    def __init__(self) -> None:
        self._steps: dict[int, list[FloatArray]] = {}

    def add(self, row: int, logits: FloatArray) -> None:
        steps = self._steps.setdefault(row, [])
        if len(steps) < FEW_STEPS:
            steps.append(logits.copy())

    def rows(self, row: int) -> FloatArray:
        steps = self._steps.get(row)
        return np.stack(steps) if steps else np.empty((0, 0), np.float32)


def _decode(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    last: Sequence[FloatArray] | None,
    case: str,
    seen: Observations,
    *,
    feed: Sequence[IntArray] | None = None,
    keep: _Keep | None = None,
) -> list[IntArray]:
    """Decode all prompts as one ragged batch; feed given tokens, or the greedy ones."""
    chosen: list[list[int]] = [[] for _ in prompts]
    if feed is None and last is not None:
        following = [int(np.argmax(logits[-1])) for logits in last]
    else:
        following = [0] * len(prompts)
    for step in range(max(prompt.steps for prompt in prompts)):
        active = [i for i, prompt in enumerate(prompts) if step < prompt.steps]
        tokens = [int(feed[i][step]) if feed is not None else following[i] for i in active]
        logits = runner.decode(active, tokens)
        for row, token, values in zip(active, tokens, logits, strict=True):
            chosen[row].append(token)
            following[row] = int(np.argmax(values))
            seen.add(case, row, [len(prompts[row].tokens) + step], values[None])
            if keep is not None:
                keep.add(row, values)
    return [np.array(row, np.int64) for row in chosen]


def _replay(
    runner: ModelRunner,
    prompt: Prompt,
    answer: IntArray,
    *,
    past: int | None = None,
    grow_to: int | None = None,
) -> FloatArray:
    """Prefill one prompt in slot 0 and decode its answer again, [steps, V].

    ``past`` makes the runner believe in another number of cached tokens; ``grow_to`` raises the
    capacity half way.
    """
    runner.prefill([0], [prompt.tokens], [0], [0])
    if past is not None:
        runner.truncate(0, past)
    steps = []
    for step, token in enumerate(answer):
        if grow_to is not None and step == len(answer) // 2:
            runner.grow(grow_to)
        steps.append(runner.decode([0], [int(token)])[0].copy())
    return np.stack(steps) if steps else np.empty((0, runner.limits.vocab_size), np.float32)


def _grown(runner: ModelRunner, prompt: Prompt, answer: IntArray) -> FloatArray | None:
    """`_replay` with the capacity raised half way; None where the context has no room for it."""
    room = runner.limits.max_context - runner.capacity
    if room <= 0 or len(answer) < 2:
        return None
    return _replay(runner, prompt, answer, grow_to=runner.capacity + min(GROWTH, room))


def _invariant(name: str, left: FloatArray, right: FloatArray) -> Invariant:
    difference = float(np.abs(left - right).max()) if left.size else 0.0
    return Invariant(name, bool(np.array_equal(left, right)), difference)
