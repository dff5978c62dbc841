"""A runner that counts and a state machine to run on it: the loop without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_runtime import BackendError
from qwen_runtime.backends.base import Limits
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


class Machine:
    """Rows that start from one prompt by copying and then go their own ways."""

    def __init__(self, rows: int, prompt: list[int], steps: int) -> None:
        self.num_rows = rows
        self.prompt, self.steps = prompt, steps
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finished = False

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
