"""An engine is believed on a device once it has answered there like the original model.

::

    ~/.cache/qwen-export/proofs/<key>.json      what was found, for one bundle, engine, GPU and driver

An engine can build without a word and answer wrongly, and nothing runs when it is built. So the
first load on a device replays reference.npz, and a mismatch refuses the engine. Deleting the
folder costs that replay once more; where it cannot be written every load replays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.backends.packed_cache import user_cache
from qwen_runtime.backends.tensorrt.seam import DeviceInfo
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.check import ReplayResult, replay
from qwen_runtime.comparison import Tolerance
from qwen_runtime.engine_description import ENGINE_FILE
from qwen_runtime.engine_file import EngineFolder
from qwen_runtime.errors import BackendError
from qwen_runtime.manifest import MANIFEST_FILE
from qwen_runtime.reference_data import ReferenceData, ReferenceRow

__all__ = ["ENGINE_TOLERANCES", "prove"]

ENGINE_TOLERANCES: dict[str, Tolerance] = {
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
_VERSION = 1
"""Part of every key; raised when a proof means something else."""
_log = logging.getLogger(__name__)


def prove(
    runner: ModelRunner,
    bundle: Bundle,
    folder: EngineFolder,
    device: DeviceInfo,
    driver: int,
) -> ReplayResult | None:
    """Replay a bundle's reference on an engine, unless that was done here before.

    Args:
        runner: The engine, loaded; its slots are empty afterwards.
        bundle: The bundle it lies in.
        folder: The engine.
        device: The GPU it runs on.
        driver: The driver's CUDA version.

    Returns:
        What was found; None where a proof of an earlier load holds.

    Raises:
        BackendError: If the engine does not answer like the original, or is too small to be asked.
        BundleError: If the bundle has no reference, or a plan is damaged.
    """
    record = _record_path(bundle, folder, device, driver)
    if record is not None and record.is_file():
        return None
    folder.check_hashes()
    data = _that_fits(ReferenceData.read(bundle), runner.limits.max_context, folder)
    compute_dtype = folder.description.compute_dtype
    layers = bundle.manifest.model.num_hidden_layers
    tolerance = ENGINE_TOLERANCES[compute_dtype].at_depth(layers)
    found = replay(str(folder.path), runner, data, tolerance)
    for slot in range(runner.num_slots):
        runner.truncate(slot, 0)
    if found.first_departure is not None:
        raise BackendError(
            f"{folder.path} must answer like its checkpoint on {device.name}, but does not: "
            f"{found.first_departure} (tolerance {tolerance:.2g}); do not use this engine: build "
            f"it again ({folder.rebuild_command}), or use backend='onnxruntime'"
        )
    if record is not None:
        _write(record, {"device": device.name, "max_error": found.max_error, "ties": found.ties})
    return found


def _that_fits(data: ReferenceData, capacity: int, folder: EngineFolder) -> ReferenceData:
    """The prompts an engine has room for, each with as many of its steps."""
    rows = tuple(
        _shortened(row, capacity - len(row.prompt))
        for row in data.rows
        if len(row.prompt) <= capacity
    )
    if not rows:
        shortest = min(len(row.prompt) for row in data.rows)
        raise BackendError(
            f"{folder.path}: --capacity must be at least {shortest} tokens so that the engine can "
            f"be checked against the bundle's reference, got {capacity}; build it again with a "
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


def _record_path(
    bundle: Bundle, folder: EngineFolder, device: DeviceInfo, driver: int
) -> Path | None:
    """Where the proof of all that an answer depends on lies; None where nothing is kept."""
    root = user_cache()
    if root is None:
        return None
    parts = {
        "version": _VERSION,
        "bundle": sha256_of(bundle.path / MANIFEST_FILE),
        "engine": sha256_of(folder.path / ENGINE_FILE),
        "device": device.name,
        "sm": device.sm,
        "driver": driver,
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
