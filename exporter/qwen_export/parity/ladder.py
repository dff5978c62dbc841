"""`verify`: does a bundle answer like its checkpoint?

The bundle runs first and chooses greedy tokens; the reference then runs once over prompts and
answers together, teacher-forced, and every position of every case is compared.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np
import torch

from qwen_export.checkpoint import Checkpoint
from qwen_export.errors import ParityError
from qwen_export.parity.case_table import GREEDY_DECODE, OFF_BY_ONE, PREFILL_WHOLE, SERVED
from qwen_export.parity.judge import judge
from qwen_export.parity.observations import Observations
from qwen_export.parity.original import BundleWeights
from qwen_export.parity.places import CpuPlace, Place
from qwen_export.parity.prompts import PromptSet, make_prompts
from qwen_export.parity.quality import Projected, Quality, measure_quality
from qwen_export.parity.reference import ReferenceBatch, Rope, StreamedReference
from qwen_export.parity.report import ParityReport
from qwen_export.parity.rounding import (
    MOST,
    MULTIPLE,
    TORCH_DTYPES,
    allowed_error,
    largest_error,
)
from qwen_export.parity.stored import compare_stored
from qwen_export.parity.summarise import CONTROLS, WIDE_WINDOW, Evidence, summarise
from qwen_export.progress import Progress, no_progress
from qwen_runtime.backends.base import IntArray
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.comparison import TOLERANCES

__all__ = ["verify"]

ROPE_CONTROLS: tuple[Rope, ...] = ("wrong theta", "swapped halves")
WIDENED_SHARE = {"fp32": 64, "fp16": 4, "bf16": 1}
"""Of a sliding window, by compute dtype: where one token is lost among thousands, or in rounding, a
control must be coarser."""
VERSIONED = (
    *("qwen-export", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13-bindings", "tensorrt"),
    *("cuda-bindings", "torch", "transformers", "onnx", "numpy"),
)


def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    place: Place | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Compare a bundle with the checkpoint it was built from.

    First every stored weight is compared with the checkpoint's, then logits and tokens with those
    of PyTorch. A quantised bundle is run twice. Computed in fp32 it must give what the original gives
    with the bundle's own weights, which proves the graphs; as it is served, its distance from the
    original is measured, which says what quantisation costs. On a device there is one run, which is
    held to the tolerance of its compute dtype and measured against the original as well; what passes
    is recorded in the user's cache folder as proved on that device.

    Args:
        bundle: The bundle; it is not written to.
        checkpoint: The original.
        place: From `open_place`, closed here; None for the CPU.
        progress: Where to report long steps.

    Returns:
        The report; whether the bundle passed is in it.

    Raises:
        ParityError: If the bundle is of a model of other dimensions, or in a format whose
            tolerance was never argued.
        BundleError: If its graph for the CPU is damaged, or was made for other weights.
        BackendError: If ONNX Runtime cannot run the bundle.
    """
    with closing(place or CpuPlace.of(bundle)) as opened:
        report = _verify(bundle, checkpoint, opened, progress)
        if report.passed:
            opened.accept(report.max_error, report.ties)
        return report


def _verify(
    bundle: Bundle, checkpoint: Checkpoint, place: Place, progress: Progress
) -> ParityReport:
    began = time.perf_counter()
    _require_comparable(bundle, checkpoint)
    stored = compare_stored(bundle, checkpoint, progress)
    quantized = bundle.manifest.quantization is not None
    weights = BundleWeights(bundle, checkpoint) if quantized else checkpoint
    reference = StreamedReference(weights)
    window = reference.sliding_window
    chosen = make_prompts(_shortened(bundle, place.max_context), window)
    prompts = chosen.prompts
    control = next(i for i, prompt in enumerate(prompts) if prompt.kind == "random")
    with Observations(bundle.manifest.model.vocab_size) as seen:
        answers, invariants = place.run(prompts, control, seen, progress)
        rows = [
            np.concatenate((prompt.tokens, answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        share = WIDENED_SHARE[place.compute_dtype]
        wrong, skipped = _controls(rows, control, len(answers[control]), reference, share)
        first = len(prompts)
        for index, original in enumerate(wrong, first):
            for case in (PREFILL_WHOLE, GREEDY_DECODE):
                seen.reuse(case, original.row, original.control, index)
        batches = _batches(chosen, rows, wrong, seen)
        with progress("Running the original", reference.num_layers) as advance:
            states = reference.hidden_states([batch for batch, _ in batches], advance)
        hidden = {
            index: state
            for (_, indices), batch in zip(batches, states, strict=True)
            for index, state in zip(indices, batch, strict=True)
        }
        ordered = [hidden[i] for i in range(first + len(wrong))]
        measured = _rounding(
            place, weights, batches[: len(_groups(chosen))], reference, hidden, progress
        )
        allowed = allowed_error(place.tolerance, checkpoint.config.num_hidden_layers, measured)
        served = any(item.case == SERVED for item in seen)
        quality = (
            _quality(seen, chosen, rows, ordered, reference, checkpoint, quantized, progress)
            if served
            else None
        )
        with progress("Comparing", sum(map(len, ordered))) as advance:
            judged, tops = judge(
                seen,
                ordered,
                reference.logits,
                bundle.manifest.model.vocab_size,
                allowed,
                advance,
            )
    return summarise(
        Evidence(
            prompts,
            tuple(answers),
            tuple(judged),
            tuple(tops),
            tuple(invariants),
            tuple(key for key in CONTROLS if key != WIDE_WINDOW or window is not None),
            skipped,
            stored,
            quality,
            place.cases,
        ),
        source=bundle.manifest.source,
        num_layers=checkpoint.config.num_hidden_layers,
        backend=place.backend,
        device=place.device,
        compute_dtype=place.compute_dtype,
        tolerance=allowed,
        tolerance_reason=_reason(place, measured),
        notes=chosen.notes,
        duration_s=time.perf_counter() - began,
        versions=_versions(),
        hashes=_hashes(bundle, place),
    )


def _shortened(bundle: Bundle, max_context: int) -> Bundle:
    """The bundle as what a device can hold of it: an engine has a capacity of its own."""
    manifest = bundle.manifest
    context = min(manifest.max_context, max_context)
    return Bundle(bundle.path, replace(manifest, max_context=context))


def _rounding(
    place: Place,
    weights: Checkpoint | BundleWeights,
    batches: Sequence[tuple[ReferenceBatch, tuple[int, ...]]],
    reference: StreamedReference,
    exact: Mapping[int, torch.Tensor],
    progress: Progress,
) -> float | None:
    """What the place's compute dtype costs PyTorch on the prompts; None where that is fp32."""
    dtype = TORCH_DTYPES.get(place.compute_dtype)
    if dtype is None:
        return None
    rounded = StreamedReference(weights, dtype)
    with progress(f"Running the original in {place.compute_dtype}", rounded.num_layers) as advance:
        states = rounded.hidden_states([batch for batch, _ in batches], advance)
    rows = [row for _, indices in batches for row in indices]
    return largest_error(
        Projected([exact[row] for row in rows], reference.logits),
        Projected([state for batch in states for state in batch], rounded.logits),
        reference.vocab_size,
    )


def _reason(place: Place, measured: float | None) -> str:
    if measured is None:
        return place.tolerance.reason
    return (
        f"{place.tolerance.reason}; on these prompts PyTorch itself in {place.compute_dtype} is off "
        f"by up to {measured:.2g}, and {MULTIPLE:g} times that is allowed where it is more, up to "
        f"{MOST:g}"
    )


def _versions() -> dict[str, str]:
    """Of what took part and is installed; ONNX Runtime has a package for each device."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def _hashes(bundle: Bundle, place: Place) -> dict[str, str]:
    """sha256 of what was verified, by name in the bundle."""
    found = {
        name: entry.sha256
        for name, entry in bundle.manifest.files.items()
        if name not in ("parity.json", "parity.html", "reference.npz")
    }
    root = bundle.path.resolve()
    return found | {
        path.resolve().relative_to(root).as_posix(): sha256_of(path) for path in place.documents
    }


def _require_comparable(bundle: Bundle, checkpoint: Checkpoint) -> None:
    manifest, config = bundle.manifest, checkpoint.config
    for name in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        ours, theirs = getattr(manifest.model, name), getattr(config, name)
        if ours != theirs:
            raise ParityError(
                f"{bundle.path} must be verified against the checkpoint it was built from "
                f"({manifest.source}), but its {name} is {ours} and {checkpoint.path} has "
                f"{theirs}; name the right one",
                path=bundle.path,
            )
    tied = checkpoint.resolve_tying().tied
    if manifest.weights.tied != tied:
        raise ParityError(
            f"{bundle.path} must be verified against the checkpoint it was built from "
            f"({manifest.source}), but {checkpoint.path} has {'one table' if tied else 'two tables'} "
            "for embedding and output projection and the bundle has not; name the right one",
            path=bundle.path,
        )
    if manifest.compute_dtype not in TOLERANCES:
        raise ParityError(
            f"{bundle.path}: compute_dtype must be one of {', '.join(TOLERANCES)} to be "
            f"verified, got {manifest.compute_dtype}",
            path=bundle.path,
        )


def _quality(
    seen: Observations,
    chosen: PromptSet,
    rows: Sequence[IntArray],
    exact: Sequence[torch.Tensor],
    reference: StreamedReference,
    checkpoint: Checkpoint,
    quantized: bool,
    progress: Progress,
) -> Quality:
    """Run the original with its own weights and measure the served bundle by it."""
    wanted = [seen.positions(row, SERVED) for row in range(len(rows))]
    kept = [
        state[np.searchsorted(seen.positions(row), wanted[row])]
        for row, state in enumerate(exact[: len(rows)])
    ]
    proved = Projected(kept, reference.logits)
    if not quantized:
        with progress("Measuring quality"):
            return measure_quality(seen, proved, proved)
    original = StreamedReference(checkpoint)
    batches = [
        ReferenceBatch(tuple(rows[i] for i in group), tuple(wanted[i] for i in group))
        for group in _groups(chosen)
    ]
    with progress("Running the original unquantised", original.num_layers) as advance:
        states = original.hidden_states(batches, advance)
    hidden: dict[int, torch.Tensor] = {}
    for group, batch in zip(_groups(chosen), states, strict=True):
        hidden.update(zip(group, batch, strict=True))
    with progress("Measuring quality"):
        return measure_quality(
            seen, Projected([hidden[row] for row in range(len(rows))], original.logits), proved
        )


@dataclass(frozen=True, slots=True)
class _WrongOriginal:
    """A reference that is wrong on purpose."""

    control: str
    row: int
    """Index of the row it runs."""
    rope: Rope = "exact"
    widened: int = 0


def _controls(
    rows: Sequence[IntArray],
    control: int,
    num_answer_tokens: int,
    reference: StreamedReference,
    share: int,
) -> tuple[list[_WrongOriginal], dict[str, str]]:
    """The wrong originals to run, and why controls do not apply."""
    wrong: list[_WrongOriginal] = []
    skipped: dict[str, str] = {}
    row = rows[control]
    exact = reference.rotary("exact", len(row))
    for rope in ROPE_CONTROLS:
        angles = reference.rotary(rope, len(row))
        if all(left.equal(right) for left, right in zip(exact, angles, strict=True)):
            skipped[rope] = "it rotates by the same angles in so short a context"
        else:
            wrong.append(_WrongOriginal(rope, control, rope))
    window = reference.sliding_window
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if window is not None and len(rows[longest]) > window:
        widened = max(1, window // share)
        wrong.append(_WrongOriginal(WIDE_WINDOW, longest, widened=widened))
    elif window is not None:
        skipped[WIDE_WINDOW] = f"no row exceeds the window of {window} tokens"
    if not num_answer_tokens:
        skipped[OFF_BY_ONE] = "the context has no room for a decode step"
    elif len(set(row.tolist())) < 2:
        skipped[OFF_BY_ONE] = "the row holds one token only, so that its past is alike everywhere"
    return wrong, skipped


def _batches(
    chosen: PromptSet,
    rows: Sequence[IntArray],
    wrong: Sequence[_WrongOriginal],
    seen: Observations,
) -> list[tuple[ReferenceBatch, tuple[int, ...]]]:
    """What the reference runs, and the index of each of its rows."""
    batches: list[tuple[ReferenceBatch, tuple[int, ...]]] = [
        (
            ReferenceBatch(tuple(rows[i] for i in group), tuple(seen.positions(i) for i in group)),
            group,
        )
        for group in _groups(chosen)
    ]
    for index, item in enumerate(wrong, len(rows)):
        positions = (seen.positions(index),)
        batch = ReferenceBatch((rows[item.row],), positions, item.rope, item.widened)
        batches.append((batch, (index,)))
    return batches


def _groups(chosen: PromptSet) -> list[tuple[int, ...]]:
    """Indices of prompts that the reference runs together: one, or those it pads on the left."""
    groups = [(i,) for i in range(len(chosen.prompts)) if i not in chosen.left_padded]
    return groups + ([chosen.left_padded] if chosen.left_padded else [])
