"""What was made for a device is believed there once it has answered like the original model.

::

    ~/.cache/qwen-export/proofs/<key>.json      what was found, for one bundle, engine, GPU and driver

An engine is a TensorRT plan, or graphs lowered for CUDA and the ONNX Runtime that runs them.

An engine can build without a word and answer wrongly, and nothing runs when it is built. So the
first load on a device replays reference.npz, and a mismatch refuses the engine. Deleting the
folder costs that replay once more; where it cannot be written every load replays.

The replay holds an engine to the tolerance that its compute type has on most models. Where a model
loses more than that to 16 bits in PyTorch too, ``qwen-export verify --device cuda`` measures how
much, and what it finds sound is recorded as proved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qwen_runtime.backends.base import (
    ArgmaxRunner,
    FloatArray,
    IntArray,
    ModelRunner,
    TopLogitsRunner,
)
from qwen_runtime.backends.device_seam import DeviceInfo
from qwen_runtime.backends.packed_cache import user_cache
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.check import ReplayResult, replay
from qwen_runtime.comparison import TOLERANCES, Tolerance
from qwen_runtime.errors import BackendError
from qwen_runtime.manifest import MANIFEST_FILE
from qwen_runtime.reference_data import ReferenceData, ReferenceRow

__all__ = ["ENGINE_TOLERANCES", "Claim", "prove", "record_proof"]

ENGINE_TOLERANCES: dict[str, Tolerance] = {
    "fp32": TOLERANCES["fp32"],
    "bf16": Tolerance(
        0.1,
        8,
        "8 bits of mantissa: PyTorch on the CPU in bf16 is off by up to 0.022 on the embedded "
        "model's 8 layers, while a lost mask, position or cache slot costs 0.1 and more",
    ),
    "fp16": Tolerance(
        0.0125,
        8,
        "11 bits of mantissa round an eighth as coarsely: PyTorch on the CPU in fp16 is off by up "
        "to 0.0023 there",
    ),
}
"""By compute dtype of an engine. Measured on the CPU, not on a GPU."""
_VERSION = 3
"""Part of every key; raised when a proof means something else."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """What is to be proved."""

    document: Path
    """The file that describes it and hashes its others; its folder is its name in messages."""
    compute_dtype: str
    software: str
    """What executes it, with its version."""
    check_hashes: Callable[[], None]
    """Raises `BundleError` where a file is damaged."""
    room: str
    """The option that says how many tokens a row can have."""
    advice: str
    """What to do where it answers otherwise than the original."""
    backend: str
    """What `qwen-export verify` calls it."""
    driver: int
    """The driver's CUDA version."""

    @property
    def name(self) -> str:
        """Its folder."""
        return str(self.document.parent)


def prove(
    runner: ModelRunner,
    bundle: Bundle,
    claim: Claim,
    device: DeviceInfo,
) -> ReplayResult | None:
    """Replay a bundle's reference on an engine, unless that was done here before.

    Where the engine chooses tokens itself, or the highest logits, those are compared with all its
    logits as well: most requests see nothing else.

    Args:
        runner: The engine, loaded; its slots are empty afterwards.
        bundle: The bundle it lies in.
        claim: The engine.
        device: The GPU it runs on.

    Returns:
        What was found; None where a proof of an earlier load holds.

    Raises:
        BackendError: If the engine does not answer like the original, or is too small to be asked.
        BundleError: If the bundle has no reference, or a plan is damaged.
    """
    record = _record_path(bundle, claim, device)
    if record is not None and record.is_file():
        return None
    claim.check_hashes()
    data = _that_fits(ReferenceData.read(bundle), runner.limits.max_context, claim)
    compute_dtype = claim.compute_dtype
    layers = bundle.manifest.model.num_hidden_layers
    tolerance = ENGINE_TOLERANCES[compute_dtype].at_depth(layers)
    found = replay(claim.name, runner, data, tolerance)
    if found.first_departure is not None:
        raise BackendError(
            f"{claim.name} must answer like its checkpoint on {device.name}, but does not: "
            f"{found.first_departure} (tolerance {tolerance:.2g}); {claim.advice}"
            f"{_measure_advice(bundle, claim)}"
        )
    _check_chosen(runner, data, tolerance, claim, device)
    for slot in range(runner.num_slots):
        runner.truncate(slot, 0)
    record_proof(bundle, claim, device, max_error=found.max_error, ties=found.ties)
    return found


def record_proof(
    bundle: Bundle, claim: Claim, device: DeviceInfo, *, max_error: float, ties: int
) -> None:
    """Remember that an engine answers like the original here, so that loading it asks no more.

    Args:
        bundle: The bundle it lies in.
        claim: The engine.
        device: The GPU it was found on.
        max_error: Its largest logit error.
        ties: Tokens that differ where rounding decides.
    """
    record = _record_path(bundle, claim, device)
    if record is not None:
        _write(record, {"device": device.name, "max_error": max_error, "ties": ties})


def _measure_advice(bundle: Bundle, claim: Claim) -> str:
    """Where rounding may be all that is wrong: how to find out."""
    if claim.compute_dtype == "fp32":
        return ""
    backend = "" if claim.backend == "onnxruntime" else f" --backend {claim.backend}"
    return (
        f"; if the model itself loses that much in {claim.compute_dtype}, `qwen-export verify "
        f"{shlex.quote(str(bundle.path))}{backend} --device cuda` finds out and accepts it"
    )


def _check_chosen(
    runner: ModelRunner, data: ReferenceData, tolerance: float, claim: Claim, device: DeviceInfo
) -> None:
    """Compare what a device chooses of its logits with all of them, over all prompts at once.

    Args:
        runner: With every prompt and its steps in the slots, as `replay` leaves them.
        data: The prompts.
        tolerance: Of a logit, relative to the largest: the same step is run twice.
        claim: The engine.
        device: The GPU it runs on.

    Raises:
        BackendError: If a token is not one with the highest logit, or a logit among the highest is
            not one of them.
    """
    argmax = runner if isinstance(runner, ArgmaxRunner) and runner.has_argmax else None
    top = runner if isinstance(runner, TopLogitsRunner) and runner.num_top else None
    if argmax is None:
        return
    rows = [np.concatenate((row.prompt, row.steps)) for row in data.rows]
    slots, last = range(len(rows)), [int(row[-1]) for row in rows]

    def rewind() -> None:
        for slot, row in enumerate(rows):
            runner.truncate(slot, len(row) - 1)

    rewind()
    logits = runner.decode(slots, last).copy()
    # Twice, because a step that comes again may be launched from a recording.
    for _ in range(2):
        rewind()
        chosen: IntArray = argmax.decode_argmax(slots, last)
        for row, token, values in zip(data.rows, chosen.tolist(), logits, strict=True):
            highest = float(values.max())
            allowed = tolerance * float(np.abs(values).max())
            if not (0 <= token < len(values) and values[token] >= highest - allowed):
                raise BackendError(
                    f"{claim.name} must choose the token with the highest logit on "
                    f"{device.name}, but after prompt {row.name!r} it chose {token} where token "
                    f"{int(values.argmax())} has it; {claim.advice}"
                )
        if top is None:
            continue
        rewind()
        found = top.decode_top(slots, last)
        whole = top.whole_logits(slots)
        for index, (row, values) in enumerate(zip(data.rows, logits, strict=True)):
            allowed = tolerance * float(np.abs(values).max())
            if _are_highest(found.logits[index], found.tokens[index], values, allowed) and (
                np.abs(whole[index] - values).max() <= allowed
            ):
                continue
            raise BackendError(
                f"{claim.name} must find the highest logits on {device.name}, but after prompt "
                f"{row.name!r} brought others; {claim.advice}"
            )


def _are_highest(logits: FloatArray, tokens: IntArray, values: FloatArray, allowed: float) -> bool:
    """Whether some logits are a row's, [V], each once, and no other one is higher than they are."""
    if tokens.min() < 0 or tokens.max() >= len(values) or len(np.unique(tokens)) < len(tokens):
        return False
    others = np.delete(values, tokens)
    return bool(
        np.abs(logits - values[tokens]).max() <= allowed
        and others.max(initial=-np.inf) <= logits.min() + allowed
    )


def _that_fits(data: ReferenceData, capacity: int, claim: Claim) -> ReferenceData:
    """The prompts an engine has room for, each with as many of its steps."""
    rows = tuple(
        _shortened(row, capacity - len(row.prompt))
        for row in data.rows
        if len(row.prompt) <= capacity
    )
    if not rows:
        shortest = min(len(row.prompt) for row in data.rows)
        raise BackendError(
            f"{claim.name}: {claim.room} must be at least {shortest} tokens so that it can be "
            f"checked against the bundle's reference, got {capacity}; build it again with a "
            "larger one"
        )
    return ReferenceData(rows)


def _shortened(row: ReferenceRow, num_steps: int) -> ReferenceRow:
    positions = num_steps + 1
    return replace(
        row,
        steps=row.steps[:num_steps],
        top_tokens=row.top_tokens[:positions],
        top_logits=row.top_logits[:positions],
        scales=row.scales[:positions],
    )


def _record_path(bundle: Bundle, claim: Claim, device: DeviceInfo) -> Path | None:
    """Where the proof of all that an answer depends on lies; None where nothing is kept."""
    root = user_cache()
    if root is None:
        return None
    parts = {
        "version": _VERSION,
        "bundle": sha256_of(bundle.path / MANIFEST_FILE),
        "engine": sha256_of(claim.document),
        "software": claim.software,
        "device": device.name,
        "sm": device.sm,
        "driver": claim.driver,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return root / "proofs" / f"{key}.json"


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Write a record under its name at once, so that none is seen half written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".making-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        Path(name).replace(path)
    except OSError as error:
        _log.debug("the proof is not kept, %s cannot be written: %s", path, error)
