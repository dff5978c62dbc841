"""Decode steps that bring less than all logits, where the rows need no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_runtime.backends.base import ArgmaxRunner, FloatArray, ModelRunner, TopLogitsRunner
from qwen_runtime.generation.base import TokenChoice

__all__ = ["Chooser"]


class Chooser:
    """Has tokens chosen beside the logits, or the logits they are drawn from.

    Args:
        runner: What executes the graphs.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._argmax = runner if isinstance(runner, ArgmaxRunner) and runner.has_argmax else None
        self._top = runner if isinstance(runner, TopLogitsRunner) and runner.num_top else None
        self._runner = runner

    def decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        choices: Sequence[TokenChoice | None],
    ) -> list[FloatArray] | None:
        """Run a step if every row can do without its logits, and fill the choices in.

        Args:
            slots: Of the rows.
            tokens: Their new tokens.
            choices: Their feeds'.

        Returns:
            Of every row [1, 0] where the choice has what it takes, or [1, V] where all logits are
            needed after all, valid until the next call. None where nothing was run.
        """
        asked = [choice for choice in choices if choice is not None]
        if len(asked) < len(choices):
            return None
        wanted = max(choice.num_top for choice in asked)
        if not wanted:
            if self._argmax is None:
                return None
            for choice, token in zip(
                asked, self._argmax.decode_argmax(slots, tokens).tolist(), strict=True
            ):
                choice.token = token
            return [_CHOSEN] * len(asked)
        if self._top is None or not self._may_do(wanted, self._top.num_top):
            return None
        found = self._top.decode_top(slots, tokens)
        results = [_CHOSEN] * len(asked)
        refused = []
        for index, choice in enumerate(asked):
            if choice.take is None:
                choice.token = int(found.best[index])
            elif not choice.take(found.logits[index], found.tokens[index]):
                refused.append(index)
        if refused:
            whole = self._top.whole_logits([slots[index] for index in refused])
            for index, values in zip(refused, whole, strict=True):
                results[index] = values[None]
        return results

    def _may_do(self, wanted: int, num_top: int) -> bool:
        """Whether the highest logits can prove that they are enough.

        One more than is wanted must be there, to bound what is not, unless all are there.
        """
        return wanted < num_top or num_top == self._runner.limits.vocab_size


_CHOSEN: FloatArray = np.empty((1, 0), np.float32)
"""Logits of a feed whose choice was made beside them."""
