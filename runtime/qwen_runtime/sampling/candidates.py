"""The tokens that survive filtering, and the base of the warpers that filter.

A filter is written once, on the surviving values of one row. Called as a processor it works on
full rows; in the fused path it works on what an earlier filter (usually top-k) left over. Both
use the same numbers in the same order, so both keep the same tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from qwen_runtime.sampling.numerics import BoolArray, FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor

__all__ = ["CandidateFilter", "CandidateProcessor", "Candidates"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens of one row whose score is not ``-inf``, in ascending id order."""

    values: FloatArray
    """Scores, [N]."""
    indices: IdArray | None
    """Token ids of the values, [N]; None where every token survives (N = vocab)."""
    vocab_size: int
    """Length of the row they come from."""

    @classmethod
    def from_row(cls, row: FloatArray) -> Candidates:
        """Collect what survives of a row of scores, [vocab].

        ``nan`` and ``+inf`` survive, so that drawing from such a row is an error as it must be.
        """
        if row.min() > -np.inf:  # False for nan
            return cls(row, None, row.shape[0])
        indices = np.flatnonzero(row != -np.inf)
        return cls(row[indices], indices, row.shape[0])

    def select(self, keep: BoolArray) -> Candidates:
        """The candidates where ``keep``, [N], is true."""
        kept = np.flatnonzero(keep)
        indices = kept if self.indices is None else self.indices[kept]
        return Candidates(self.values[kept], indices, self.vocab_size)

    def to_row(self) -> FloatArray:
        """A full row of scores, [vocab], ``-inf`` where a token did not survive."""
        if self.indices is None:
            return self.values.copy()
        row = np.full(self.vocab_size, -np.inf, dtype=np.float32)
        row[self.indices] = self.values
        return row

    def token_id(self, position: int) -> int:
        """The token id at a position in ``values``."""
        return position if self.indices is None else int(self.indices[position])


class CandidateProcessor(LogitsProcessor):
    """A processor of one row's survivors; removed tokens neither count nor come back."""

    @abstractmethod
    def apply(self, candidates: Candidates) -> Candidates:
        """Process the survivors of one row (at least one)."""

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Apply to every row; see :class:`LogitsProcessor`."""
        rows = [Candidates.from_row(row) for row in scores]
        return np.stack(
            [self.apply(row).to_row() if row.values.size else row.to_row() for row in rows]
        )


class CandidateFilter(CandidateProcessor):
    """A warper that removes tokens and leaves the scores of the others as they are."""

    @abstractmethod
    def keep(self, values: FloatArray) -> BoolArray:
        """Which survivors stay.

        Args:
            values: Scores of the survivors, [N] with N > 0, in ascending id order.

        Returns:
            True where a token stays, [N]. Rows with ``nan`` or ``+inf`` keep everything:
            no comparison with ``nan`` is true.
        """

    def apply(self, candidates: Candidates) -> Candidates:
        """Filter the survivors of one row."""
        return candidates.select(self.keep(candidates.values))
