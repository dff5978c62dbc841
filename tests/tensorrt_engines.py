"""Engines in a bundle's folder that `tensorrt_double` can load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorrt_double import MAGIC, VERSION

from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.engine_description import (
    ENGINE_FILE,
    EngineDescription,
    EngineProfile,
    PlanEntry,
    SizeEntry,
)
from qwen_runtime.engine_file import EngineFolder

__all__ = ["add_engine", "edit_plan", "linked_bundle"]


def linked_bundle(source: Path, target: Path) -> Bundle:
    """A copy of a bundle whose files are hard links, to add engines to."""
    shutil.copytree(source, target, copy_function=os.link)
    return Bundle.open(target)


def add_engine(
    bundle: Bundle,
    *,
    name: str = "tensorrt-rtx",
    dtype: str = "FLOAT",
    capacity: int = 64,
    max_batch: int = 4,
    max_sequence: int = 16,
    max_num_logits: int = 8,
    separate: bool = False,
    version: str = VERSION,
) -> EngineFolder:
    """Write an engine that the double can load.

    Args:
        bundle: Where to; from `linked_bundle`.
        name: Folder and flavour.
        dtype: Type of the caches in the plan, by TensorRT's name. "FLOAT" makes the double exact;
            engine.json, which knows only what is built, calls it bf16.
        capacity: Tokens of a slot.
        max_batch: Rows of a call.
        max_sequence: New tokens per row.
        max_num_logits: Positions per row whose logits come back.
        separate: A plan for each graph, instead of one with two profiles.
        version: TensorRT's release.
    """
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    batch = SizeEntry(1, 1, max_batch)
    one = SizeEntry(1, 1, 1)
    prefill = {
        "batch": batch,
        "sequence": SizeEntry(1, max_sequence, max_sequence),
        "num_logits": SizeEntry(1, 1, max_num_logits),
    }
    plans = []
    if separate:
        for phase, sizes in (("prefill", prefill), ("decode", {"batch": batch})):
            profiles = [EngineProfile(phase, sizes, 4096)]
            plans.append(
                _write_plan(bundle, folder, f"{phase}.plan", phase, profiles, dtype, capacity)
            )
    else:
        decode = {"batch": batch, "sequence": one, "num_logits": one}
        profiles = [EngineProfile("prefill", prefill, 8192), EngineProfile("decode", decode, 4096)]
        plans.append(
            _write_plan(bundle, folder, "engine.plan", "prefill", profiles, dtype, capacity)
        )
    files = [*(graph.file for graph in bundle.manifest.graphs.values()), "weights.bin"]
    description = EngineDescription(
        producer="the double",
        created="2026-01-01T00:00:00Z",
        flavour=name,
        version=version,
        sms=(80, 86, 89, 120, 121),
        compute_dtype="fp16" if dtype == "HALF" else "bf16",
        capacity=capacity,
        max_batch=max_batch,
        max_sequence=max_sequence,
        max_num_logits=max_num_logits,
        inputs={file: bundle.manifest.files[file].sha256 for file in files},
        options=("--target", name),
        aliases=_aliases(bundle),
        plans=tuple(plans),
        warnings=(),
    )
    (folder / ENGINE_FILE).write_text(description.to_json(), "utf-8")
    return EngineFolder.open(bundle, name)


def edit_plan(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], file: str = "engine.plan"
) -> EngineFolder:
    """Change what a plan of the double says, and engine.json to fit."""
    folder = bundle.path / "engines" / "tensorrt-rtx"
    content = json.loads((folder / file).read_bytes()[len(MAGIC) :])
    change(content)
    (folder / file).write_bytes(MAGIC + json.dumps(content).encode())
    raw = json.loads((folder / ENGINE_FILE).read_text())
    for plan in raw["plans"]:
        if plan["file"] == file:
            plan["sha256"] = sha256_of(folder / file)
            plan["num_bytes"] = (folder / file).stat().st_size
    (folder / ENGINE_FILE).write_text(json.dumps(raw))
    return EngineFolder.open(bundle, "tensorrt-rtx")


def _aliases(bundle: Bundle) -> dict[str, str]:
    layers = range(bundle.manifest.model.num_hidden_layers)
    return {
        f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
        for layer in layers
        for part in ("key", "value")
    }


def _write_plan(
    bundle: Bundle,
    folder: Path,
    file: str,
    graph: str,
    profiles: Sequence[EngineProfile],
    dtype: str,
    capacity: int,
) -> PlanEntry:
    entry = bundle.manifest.graphs[graph]
    tensors, shapes = [], [{} for _ in profiles]
    for is_input, values in ((True, entry.inputs), (False, entry.outputs)):
        for value in values:
            cached = value.name.startswith(("past_key_values.", "present."))
            sizes = [capacity if size == "capacity" else size for size in value.shape]
            kind = dtype if cached else {"int64": "INT64"}.get(value.dtype, "FLOAT")
            fixed = [size if isinstance(size, int) else -1 for size in sizes]
            tensors.append([value.name, is_input, kind, fixed])
            for profile, shape in zip(profiles, shapes, strict=True) if is_input else ():
                ranges = [profile.sizes[s] if isinstance(s, str) else s for s in sizes]
                shape[value.name] = [
                    [getattr(size, bound, size) for size in ranges] for bound in ("min", "max")
                ]
    content = {
        "bundle": str(bundle.path),
        "graph": graph,
        "tensors": tensors,
        "profiles": shapes,
        "aliases": _aliases(bundle),
        "scratch": [profile.activation_bytes for profile in profiles],
    }
    (folder / file).write_bytes(MAGIC + json.dumps(content).encode())
    size = (folder / file).stat().st_size
    return PlanEntry(file, graph, sha256_of(folder / file), size, 1000, 1000, tuple(profiles), ())
