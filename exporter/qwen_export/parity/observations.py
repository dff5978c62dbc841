"""Logits the bundle gave, kept on disk until the reference has run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_runtime.backends.base import FloatArray, IntArray

__all__ = ["Observation", "Observations"]


@dataclass(frozen=True, slots=True)
class Observation:
    """Logits of some positions of one row, from one way of running the bundle."""

    case: str
    """Key of the way they were made."""
    row: int
    """Index of the prompt, or of the negative control, they belong to."""
    positions: IntArray
    """Counted from the prompt's first token, [n]."""
    first: int
    """Where the logits begin in the file, in rows of V."""


class Observations:
    """All observations of a verification; a context manager that owns a temporary file.

    A large vocabulary makes gigabytes of logits, while memory is to stay near the largest tensor.

    Attributes:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._file = tempfile.TemporaryFile(prefix="qwen-export-logits-")  # noqa: SIM115 - closed in __exit__
        self._num_rows = 0
        self._all: list[Observation] = []

    def __enter__(self) -> Observations:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._all)

    def add(self, case: str, row: int, positions: Sequence[int], logits: FloatArray) -> None:
        """Keep logits [n, V] of n positions."""
        if logits.shape != (len(positions), self.vocab_size):
            raise AssertionError(f"{case}: {logits.shape} logits for {len(positions)} positions")
        if not len(positions):
            return
        kept = np.asarray(positions, np.int64)
        self._all.append(Observation(case, row, kept, self._num_rows))
        self._file.seek(self._num_rows * self.vocab_size * 4)
        self._file.write(np.ascontiguousarray(logits, np.float32).data)
        self._num_rows += len(kept)

    def reuse(self, source: str, source_row: int, case: str, row: int) -> None:
        """Judge the logits of one case against another row as well, under another case."""
        for item in [o for o in self._all if (o.case, o.row) == (source, source_row)]:
            self._all.append(Observation(case, row, item.positions, item.first))

    def read(self, item: Observation, index: int) -> FloatArray:
        """Logits of ``item.positions[index]``, [V]."""
        self._file.seek((item.first + index) * self.vocab_size * 4)
        return np.frombuffer(self._file.read(self.vocab_size * 4), np.float32)

    def positions(self, row: int, case: str | None = None) -> IntArray:
        """Every position of a row that a case observed, or any case, sorted."""
        found = [
            item.positions for item in self._all if item.row == row and case in (None, item.case)
        ]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
