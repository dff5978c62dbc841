"""The lowest rung: does a bundle's weights file hold the checkpoint's weights?

Everything above it takes weights for granted: the logits of a quantised bundle are compared with
those of its own weights, which shows that the graphs are right and not where the weights are from.

Shape letters: K inputs of a weight, N its outputs, G inputs that share a scale, n outputs of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors import LM_HEAD_NAME
from qwen_export.errors import ParityError
from qwen_export.formats import role_of
from qwen_export.model.parameters import parameters
from qwen_export.parity.original import BundleWeights, CheckpointWeights
from qwen_export.progress import Advance, Progress, no_progress
from qwen_export.quantization.tensor import code_range
from qwen_export.sources import stored_names
from qwen_export.weights import to_float32
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import QuantizationEntry

__all__ = ["StoredWeights", "compare_stored"]

Floats = npt.NDArray[np.float32]
Energies = npt.NDArray[np.float64]

SLICE_VALUES = 1 << 22
"""Weights compared at a time: 16 MB in fp32, and a few arrays of that size."""
ROUNDING = 1.1
"""Factor on what is allowed: the search compares scales in fp32, whose sums are that exact."""
GPTQ_FACTOR = 16.0
"""Factor on what is allowed to gptq, which moves a weight by the errors of those before it: two
steps of its block instead of half of one."""
GPTQ_MAX_ERROR = 0.5
"""Of an output's energy: where blocks have one large weight, two steps would be anything."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A weights file against the checkpoint, all tensors, all values."""

    tensors: int
    """Tensors compared."""
    exact: int
    """Those with the checkpoint's own numbers, bit by bit."""
    max_error: float
    """Largest relative squared error of an output of the others."""
    max_share: float
    """Largest squared error of an output, as a share of what its codes may cost."""
    worst: str | None
    """The tensor with the largest share; None where all are exact."""
    departed: tuple[str, ...]
    """Tensors that are not the checkpoint's, in the order of the layers."""
    problem: str | None
    """The first of them and what is wrong with it, in words; None if all are well."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """One tensor."""

    equal: bool
    max_error: float = 0.0
    max_share: float = 0.0
    problem: str | None = None


def compare_stored(
    bundle: Bundle,
    checkpoint: Checkpoint,
    progress: Progress = no_progress,
) -> StoredWeights:
    """Compare every weight of a bundle with the checkpoint's, in one pass over both.

    Floats and codes that the checkpoint brought must be the same numbers. Of weights that were
    quantised, no output may be further off than its blocks' steps allow: round-to-nearest with
    scales that clip nothing moves the largest weight of a block by nothing and the others by half
    a step at most, and the search takes no scale that is worse.

    Args:
        bundle: The bundle.
        checkpoint: A checkpoint of the same dimensions and tying.
        progress: Where to report the step.

    Returns:
        What was found; a departure is in it and does not raise.

    Raises:
        ParityError: If the bundle lacks a tensor that the checkpoint's config calls for.
    """
    ours, theirs = BundleWeights(bundle, checkpoint), CheckpointWeights(checkpoint)
    rule = _Rule(bundle, checkpoint, ours)
    pairs = list(_pairs(ours, checkpoint))
    for name, _ in pairs:
        if name not in ours:
            raise ParityError(
                f"{bundle.path} must hold every tensor of the checkpoint it was built from, but "
                f"has no {name}, which {checkpoint.path} calls for; name the right one",
                path=bundle.path,
            )
    total = sum(math.prod(theirs.shape(stored)) for _, stored in pairs)
    with progress("Comparing stored weights", total) as advance:
        found = {
            name: _compare(name, stored, ours, theirs, rule, advance) for name, stored in pairs
        }
    worst = max(found, key=lambda name: found[name].max_share)
    departed = tuple(name for name, item in found.items() if item.problem is not None)
    return StoredWeights(
        len(found),
        sum(item.equal for item in found.values()),
        max(item.max_error for item in found.values()),
        found[worst].max_share,
        worst if found[worst].max_share else None,
        departed,
        found[departed[0]].problem if departed else None,
    )


def _pairs(ours: BundleWeights, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Names of each tensor in the bundle and in the checkpoint."""
    names = stored_names(checkpoint.resolve_tying())
    wanted = dict.fromkeys(ours.names)
    if not ours.tying.tied or LM_HEAD_NAME in ours:
        wanted[LM_HEAD_NAME] = None
    for name in wanted:
        yield name, names.get(name, name)


class _Rule:
    """Which weights must be the checkpoint's own numbers, and which by what method they are off."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, ours: BundleWeights) -> None:
        self._entry: QuantizationEntry | None = bundle.manifest.quantization
        self._checkpoint = checkpoint
        self._ours = ours
        tied = ours.tying.tied
        wanted = parameters(checkpoint.config, tied=tied, max_context=bundle.manifest.max_context)
        self._roles = {parameter.name: role_of(parameter, tied=tied) for parameter in wanted}

    def allowance(self, name: str, stored: str) -> Callable[[Floats], Energies] | None:
        """The squared error that outputs [n, K] may have, [n]; None where there may be none."""
        block = self._ours.format_of(name)
        if block is None or self._entry is None:
            return None
        role = self._roles.get(name, "tied table")
        kind = (role, block.name, block.block_size)
        methods = {
            group.method
            for group in self._entry.groups
            if (group.role, group.format, group.block_size) == kind
        }
        chosen = methods - {"imported"}
        if not chosen:
            return None
        if "imported" in methods:
            # Weights of both kinds are stored alike; the checkpoint's own codes, where they fit.
            own = self._checkpoint.quantized.get(stored)
            bits = None if own is None else own.find_exact_bits(read=True)
            if bits is not None and bits <= block.bits:
                return None
        calibrated = "gptq" in chosen

        def allowed(weights: Floats) -> Energies:
            energies = _half_steps(weights, block.bits, block.block_size)
            if calibrated:
                return np.minimum(GPTQ_FACTOR * energies, GPTQ_MAX_ERROR * _energy(weights))
            return energies

        return allowed


def _compare(
    name: str,
    stored: str,
    ours: BundleWeights,
    theirs: CheckpointWeights,
    rule: _Rule,
    advance: Advance,
) -> _Compared:
    shape = theirs.shape(stored)
    allowed = rule.allowance(name, stored)
    step = max(1, SLICE_VALUES // shape[1]) if len(shape) > 1 else shape[0]
    equal, max_error, max_share, problem = True, 0.0, 0.0, None
    for start in range(0, shape[0], step):
        which = slice(start, min(start + step, shape[0]))
        left = np.asarray(ours.rows(name, which))
        right = to_float32(theirs.rows(stored, which))
        theirs.release(stored)
        advance(right.size)
        if left.dtype == np.float32 and np.array_equal(
            left.view(np.uint32), right.view(np.uint32)
        ):
            continue
        equal = False
        if allowed is None or right.ndim == 1:
            problem = problem or _unequal(name, left, right, start)
            continue
        errors, bounds, energies = _energy(left - right), allowed(right), _energy(right)
        shares = _ratio(errors, bounds)
        max_share = max(max_share, float(shares.max()))
        max_error = max(max_error, float(_ratio(errors, energies).max()))
        if problem is None and not shares.max() <= 1:
            row = int(np.flatnonzero(~(shares <= 1))[0])
            problem = (
                f"stored weights: {name}, output {start + row} of {shape[0]}: its codes have "
                f"{_percent(errors[row], energies[row])} of the squared weights as error, but may "
                f"have {_percent(bounds[row], energies[row])}; they are not made of the "
                "checkpoint's weight"
            )
    return _Compared(equal, max_error, max_share, problem)


def _unequal(name: str, left: npt.NDArray[np.generic], right: Floats, start: int) -> str:
    place = np.argwhere(left != right)
    if not len(place):  # zeros of two signs
        place = np.argwhere(np.signbit(left) != np.signbit(right))
    first = tuple(place[0].tolist())
    where = ", ".join(map(str, (first[0] + start, *first[1:])))
    return (
        f"stored weights: {name} must hold the checkpoint's own numbers, but [{where}] is "
        f"{float(left[first]):.9g} where the checkpoint has {float(right[first]):.9g}"
    )


def _half_steps(weights: Floats, bits: int, block_size: int) -> Energies:
    """Squared error of outputs [n, K] whose weights are all half a step off, but each largest."""
    low, high = code_range(bits)
    blocks = weights.reshape(len(weights), -1, block_size)
    steps = np.maximum(blocks.max(axis=2) / high, blocks.min(axis=2) / low).astype(np.float64)
    # Scales are normal numbers, so that a step is never smaller.
    np.maximum(steps, np.finfo(np.float32).tiny, out=steps)
    energies: Energies = ROUNDING * (block_size - 1) / 4 * np.square(steps).sum(axis=1)
    return energies


def _energy(values: Floats) -> Energies:
    """Sum of squares of each row of [n, K]."""
    result: Energies = np.einsum("nk,nk->n", values, values, dtype=np.float64)
    return result


def _ratio(part: Energies, whole: Energies) -> Energies:
    """Part of the whole, infinite where the whole is nothing; NaN counts as infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(part == 0, 0.0, part / whole)
    ratio[np.isnan(ratio)] = np.inf
    return ratio


def _percent(part: np.float64, whole: np.float64) -> str:
    return f"{part / whole:.2%}" if whole else f"{part:.2g} (of weights that are 0)"
