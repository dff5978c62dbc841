"""Runners without a model, and a state machine to run on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_runtime import BackendError
from qwen_runtime.backends.base import Limits
from qwen_runtime.cache import KVCache
from qwen_runtime.generation.base import Feed, RowCopy, Step


class CountingRunner:
    """Remembers every slot's tokens; logits point at the sum of what a slot holds."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.limits = Limits(vocab_size=16, max_context=1000)
        self.held: list[list[int]] = []
        self.capacity = 1
        self.calls = 0
        self.fail_at = fail_at

    @property
    def num_slots(self) -> int:
        return len(self.held)

    def allocate(self, slots: int, capacity: int) -> None:
        self.held += [[] for _ in range(slots - len(self.held))]

    def prefill(self, slots: Any, tokens: Any, past: Any, want: Any) -> list[np.ndarray]:
        self._count()
        assert len(set(slots)) == len(slots)
        rows = []
        for slot, new, length, count in zip(slots, tokens, past, want, strict=True):
            assert len(self.held[slot]) == length
            self.held[slot] += list(map(int, new))
            rows.append(np.stack([self._logits(slot)] * count) if count else np.empty((0, 16)))
        return rows

    def decode(self, slots: Any, tokens: Any) -> np.ndarray:
        self._count()
        for slot, token in zip(slots, tokens, strict=True):
            self.held[slot].append(int(token))
        return np.stack([self._logits(slot) for slot in slots])

    def copy(self, src: int, dst: int, length: int) -> None:
        self.held[dst] = self.held[src][:length]

    def truncate(self, slot: int, length: int) -> None:
        assert len(self.held[slot]) >= length
        del self.held[slot][length:]

    def grow(self, capacity: int) -> None: ...

    def close(self) -> None: ...

    def _logits(self, slot: int) -> np.ndarray:
        return np.eye(16, dtype=np.float32)[sum(self.held[slot]) % 16]

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise BackendError("the graph failed")


class RoundingRunner:
    """Keeps tokens in real buffers, and rounds the odd last token of a call differently.

    So does a kernel that takes tokens in pairs; every kernel does so with a token alone.

    What is written for a token depends on all before it, as keys of deeper layers do. A decode call
    writes into idle slots that lie between, after their tokens.
    """

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.limits = Limits(vocab_size=16, max_context=1000)
        self.cache = KVCache(
            ["0.key"], num_key_value_heads=1, head_dim=1, dtype=np.int64, max_context=1000
        )
        self.calls = self.computed = 0
        self.fail_at = fail_at

    @property
    def num_slots(self) -> int:
        return self.cache.num_slots

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def allocate(self, slots: int, capacity: int) -> None:
        self.cache.reserve(slots, capacity)

    def grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            self.allocate(self.num_slots, capacity)

    def copy(self, src: int, dst: int, length: int) -> None:
        assert length <= self.cache.lengths[src]
        self.cache.copy(src, dst, length)

    def truncate(self, slot: int, length: int) -> None:
        assert length <= self.cache.lengths[slot]
        self.cache.lengths[slot] = length

    def prefill(self, slots: Any, tokens: Any, past: Any, want: Any) -> list[np.ndarray]:
        self.grow(max(p + len(t) for p, t in zip(past, tokens, strict=True)))
        for slot, length in zip(slots, past, strict=True):
            assert self.cache.lengths[slot] == length
        rows = [self._write(slot, new) for slot, new in zip(slots, tokens, strict=True)]
        self._count()
        return [values[len(values) - count :] for values, count in zip(rows, want, strict=True)]

    def decode(self, slots: Any, tokens: Any) -> np.ndarray:
        self.grow(int(max(self.cache.lengths[slot] for slot in slots)) + 1)
        for slot in set(range(min(slots), max(slots) + 1)) - set(slots):
            length = self.cache.lengths[slot]
            if length < self.capacity:
                self._write(slot, np.zeros(1, np.int64))
                self.cache.lengths[slot] = length
        rows = [
            self._write(slot, np.array([token])) for slot, token in zip(slots, tokens, strict=True)
        ]
        self._count()
        return np.concatenate(rows)

    def close(self) -> None:
        self.cache.clear()

    def _write(self, slot: int, tokens: np.ndarray) -> np.ndarray:
        ((_, buffer),) = self.cache.rows(slot, slot + 1)
        held, start = buffer[0, 0, :, 0], int(self.cache.lengths[slot])
        assert start + len(tokens) <= self.capacity
        unpaired = start + len(tokens) - 1 if len(tokens) % 2 else -1
        for place, token in enumerate(tokens.tolist(), start):
            before = int(held[place - 1]) if place else 0
            held[place] = (before * 31 + token * 2 + (place == unpaired) + 7) % 1_000_003
        self.cache.lengths[slot] = start + len(tokens)
        self.computed += len(tokens)
        return np.eye(16, dtype=np.float32)[held[start : start + len(tokens)] % 16]

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise BackendError("the graph failed")


class Machine:
    """Rows that start from one prompt by copying and then go their own ways."""

    def __init__(self, rows: int, prompt: list[int], steps: int) -> None:
        self.num_rows = rows
        self.prompt, self.steps = prompt, steps
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finished = False
        self.num_cached = 0

    def next_step(self) -> Step:
        past = len(self.prompt) + len(self.tokens[0]) - 1
        if past < len(self.prompt):
            return Step((Feed(0, np.array(self.prompt), past=0, want=1),))
        copies = [RowCopy(0, row, past) for row in range(1, self.num_rows)]
        return Step(
            tuple(
                Feed(row, np.array(tokens[-1:]), past=past, want=1)
                for row, tokens in enumerate(self.tokens)
            ),
            tuple(copies) if past == len(self.prompt) else (),
        )

    def accept(self, logits: Any) -> None:
        for row, tokens in enumerate(self.tokens):
            best = int(logits[row if len(logits) > 1 else 0][-1].argmax())
            tokens.append((best + row) % 16)
        self.finished = len(self.tokens[0]) == self.steps

    def note_cached(self, row: int, num_tokens: int) -> None:
        assert row == 0
        self.num_cached = num_tokens

    def cancel(self) -> None:
        self.finished = True


def expected(machine: Machine) -> list[list[int]]:
    """What the rows must generate, worked out without an engine."""
    first = sum(machine.prompt)
    rows = []
    for row in range(machine.num_rows):
        total, tokens = first, []
        for _ in range(machine.steps):
            tokens.append((total + row) % 16)
            total += tokens[-1]
        rows.append(tokens)
    return rows
