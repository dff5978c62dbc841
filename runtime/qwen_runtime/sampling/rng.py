"""Random generators that draw tokens: a fast one of ours, and torch's CPU generator.

Both draw from the surviving tokens only, and give what a draw from the full row would give.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.numerics import FloatArray, IdArray

__all__ = ["DefaultGenerator", "TokenGenerator", "TorchGenerator", "check_seed", "make_generator"]

_SEEDS = 2**64
# Above this many candidates the inverse distribution is searched in two steps.
_BLOCK = 512


def check_seed(seed: object) -> int:
    """Return a seed, or raise RequestError if it is not an integer in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise RequestError(f"seed must be an integer in [0, 2**64), got {seed!r}", param="seed")
    return seed


class TokenGenerator(ABC):
    """A stream of random choices; every call continues where the last one stopped."""

    @abstractmethod
    def choose(self, probabilities: FloatArray, indices: IdArray | None, vocab_size: int) -> int:
        """Draw one token.

        Args:
            probabilities: Of the surviving tokens, [N], in ascending id order.
            indices: Their ids, [N]; None where all of the vocabulary survives.
            vocab_size: Length of the row they come from.

        Returns:
            Position of the drawn token in ``probabilities``.
        """

    @abstractmethod
    def multinomial(
        self, probabilities: FloatArray, num_samples: int, *, replacement: bool = False
    ) -> IdArray:
        """Draw several indices of one row.

        Args:
            probabilities: Weights, [N]; they need not sum to 1.
            num_samples: How many to draw; at most N without replacement.
            replacement: Whether an index may be drawn again.

        Returns:
            Indices in the order drawn, [num_samples].
        """

    @abstractmethod
    def rand(self, size: int) -> FloatArray:
        """Uniform numbers in [0, 1), [size] float32."""


class DefaultGenerator(TokenGenerator):
    """The fast generator: counter-based Philox, one number per token.

    What it draws depends on the seed, the stream and the number of draws before, never on other
    requests of a batch.

    Args:
        seed: Integer in [0, 2**64); None takes one from the operating system.
        stream: Separates sequences of one request, >= 0; the first sequence is stream 0.

    Raises:
        RequestError: If the seed is out of range.
    """

    def __init__(self, seed: int | None = None, *, stream: int = 0) -> None:
        self.seed = secrets.randbits(64) if seed is None else check_seed(seed)
        key = np.array([self.seed, stream], dtype=np.uint64)
        self._random = np.random.Generator(np.random.Philox(key=key))

    def choose(self, probabilities: FloatArray, indices: IdArray | None, vocab_size: int) -> int:
        """Draw one token with one uniform number; see :class:`TokenGenerator`."""
        return _invert(probabilities, self._random.random())

    def multinomial(
        self, probabilities: FloatArray, num_samples: int, *, replacement: bool = False
    ) -> IdArray:
        """Draw several indices; see :class:`TokenGenerator`."""
        if replacement:
            return np.array(
                [_invert(probabilities, u) for u in self._random.random(num_samples)],
                dtype=np.int64,
            )
        _check_enough(probabilities, num_samples)
        # Exponential race: the order of p / Exp(1) is a draw without replacement.
        waits = self._random.standard_exponential(probabilities.shape, dtype=np.float32)
        return _leaders(_race(probabilities, waits), num_samples)

    def rand(self, size: int) -> FloatArray:
        """Uniform numbers; see :class:`TokenGenerator`."""
        return self._random.random(size, dtype=np.float32)


class TorchGenerator(TokenGenerator):
    """torch's CPU generator: the tokens of ``torch.manual_seed(seed)`` and ``multinomial``.

    torch draws for every row of a batch, finished rows included, from one stream: share one
    generator, call it row by row, and :meth:`skip` rows that no longer draw.

    Args:
        seed: Integer in [0, 2**64), of which torch uses the low 32 bits; None takes one from
            the operating system.

    Raises:
        RequestError: If the seed is out of range.

    Source:
        Mersenne Twister 19937 (Matsumoto and Nishimura, 1998), consumed as torch 2.13 does in
        ``aten/src/ATen/native/cpu``; checked number by number against torch in the tests.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(32) if seed is None else check_seed(seed)
        self._twister = np.random.RandomState(self.seed & 0xFFFFFFFF)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _uniform64(self, words: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Doubles in [0, 1) from pairs of words, [N, 2]."""
        wide = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
        uniform: NDArray[np.float64] = (wide & np.uint64(2**53 - 1)) / 2.0**53
        return uniform

    def _exponential(self, size: int, indices: IdArray | None = None) -> FloatArray:
        """Numbers of ``Tensor.exponential_`` over ``size`` entries, those at ``indices``."""
        words = self._words(2 * size).reshape(size, 2)
        if indices is not None:
            words = words[indices]
        return (-np.log1p(-self._uniform64(words))).astype(np.float32)

    def choose(self, probabilities: FloatArray, indices: IdArray | None, vocab_size: int) -> int:
        """Draw one token as ``torch.multinomial(row, 1)``; see :class:`TokenGenerator`."""
        return int(np.argmax(_race(probabilities, self._exponential(vocab_size, indices))))

    def multinomial(
        self, probabilities: FloatArray, num_samples: int, *, replacement: bool = False
    ) -> IdArray:
        """Draw as ``torch.multinomial(row, num_samples)``; see :class:`TokenGenerator`."""
        size = probabilities.shape[0]
        if num_samples == 1 or not replacement:
            _check_enough(probabilities, num_samples)
            return _leaders(_race(probabilities, self._exponential(size)), num_samples)
        cumulative: FloatArray = np.cumsum(probabilities, dtype=np.float32)
        cumulative = cumulative / cumulative[-1]
        cumulative[-1] = 1
        uniform = self._uniform64(self._words(2 * num_samples).reshape(num_samples, 2))
        return np.searchsorted(cumulative.astype(np.float64), uniform, side="left")

    def rand(self, size: int) -> FloatArray:
        """Uniform numbers as ``torch.rand(size)``; see :class:`TokenGenerator`."""
        low_bits = self._words(size) & np.uint32(2**24 - 1)
        return low_bits.astype(np.float32) / np.float32(2**24)

    def skip(self, vocab_size: int) -> None:
        """Pass over the numbers that drawing one token of one row consumes."""
        self._words(2 * vocab_size)


def make_generator(rng: str, seed: int | None, *, stream: int = 0) -> TokenGenerator:
    """Create the generator a request asks for.

    Args:
        rng: "default" or "torch".
        seed: Integer in [0, 2**64), or None for one from the operating system.
        stream: Index of the sequence within its request; the torch generator is shared by all
            sequences of a call instead, as in torch, and takes only 0.

    Returns:
        A generator at its start.

    Raises:
        RequestError: If ``rng`` or the seed is none of these.
    """
    if rng == "default":
        return DefaultGenerator(seed, stream=stream)
    if rng == "torch" and stream == 0:
        return TorchGenerator(seed)
    raise RequestError(
        f'rng must be "default" or "torch" (stream 0), got {rng!r} with stream {stream}; '
        'use "torch" to reproduce the tokens of torch on CPU',
        param="rng",
    )


def _race(probabilities: FloatArray, waits: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        race: FloatArray = probabilities / waits
    return race


def _leaders(race: FloatArray, count: int) -> IdArray:
    leaders: IdArray = np.argpartition(-race, count - 1)[:count]
    ordered: IdArray = leaders[np.argsort(-race[leaders], kind="stable")]
    return ordered


def _check_enough(probabilities: FloatArray, num_samples: int) -> None:
    if num_samples > probabilities.shape[0]:
        raise RequestError(
            f"num_samples must be at most the number of candidates {probabilities.shape[0]}, "
            f"got {num_samples}; draw fewer or with replacement",
            param="num_samples",
        )


def _invert(probabilities: FloatArray, uniform: float) -> int:
    """Position where the cumulative distribution passes ``uniform`` of its total."""
    start = 0
    if probabilities.shape[0] > 8 * _BLOCK:
        # First the block, then the place in it: most of the row is only summed.
        starts = np.arange(0, probabilities.shape[0], _BLOCK)
        ends = np.cumsum(np.add.reduceat(probabilities, starts, dtype=np.float64))
        target = uniform * ends[-1]
        block = min(int(np.searchsorted(ends, target, side="right")), len(starts) - 1)
        target -= ends[block - 1] if block else 0.0
        start = int(starts[block])
        probabilities = probabilities[start : start + _BLOCK]
        cumulative = np.cumsum(probabilities, dtype=np.float64)
    else:
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        target = uniform * cumulative[-1]
    position = int(np.searchsorted(cumulative, target, side="right"))
    if position == probabilities.shape[0]:  # the target was rounded up to the total
        position = int(np.flatnonzero(probabilities)[-1])
    return start + position
