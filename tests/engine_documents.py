"""Engines' folders whose plans are no plans: for what reads engine.json alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qwen_runtime.engine_description import (
    ENGINE_FILE,
    EngineDescription,
    EngineProfile,
    KernelEntry,
    PlanEntry,
    SizeEntry,
)

__all__ = ["PLAN", "description", "write_engine"]

PLAN = b"plan"
_BATCH = SizeEntry(1, 1, 8)
_ONE = SizeEntry(1, 1, 1)
_PROFILES = (
    EngineProfile(
        "prefill",
        {"batch": _BATCH, "sequence": SizeEntry(1, 64, 128), "num_logits": SizeEntry(1, 1, 32)},
        1000,
    ),
    EngineProfile("decode", {"batch": _BATCH, "sequence": _ONE, "num_logits": _ONE}, None),
)


def description(**changes: Any) -> EngineDescription:
    """An engine of one plan with two profiles, or as asked for."""
    plan = PlanEntry(
        "engine.plan",
        "prefill",
        hashlib.sha256(PLAN).hexdigest(),
        len(PLAN),
        2,
        2,
        _PROFILES,
        (KernelEntry("kernel", "gemm"),),
    )
    values: dict[str, Any] = {
        "producer": "qwen-export 0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "sms": (80, 86),
        "compute_dtype": "bf16",
        "capacity": 256,
        "max_batch": 8,
        "max_sequence": 128,
        "max_num_logits": 32,
        "inputs": {"prefill.onnx": "0" * 64, "weights.bin": "1" * 64},
        "options": ("--target", "tensorrt-rtx", "--compute-dtype", "bf16", "--sms", "80,86"),
        "aliases": {f"present.0.{part}": f"past_key_values.0.{part}" for part in ("key", "value")},
        "plans": (plan,),
        "warnings": (),
    }
    return EngineDescription(**values | changes)


def write_engine(folder: Path, **changes: Any) -> Path:
    """Write such an engine."""
    folder.mkdir(parents=True)
    (folder / ENGINE_FILE).write_text(description(**changes).to_json(), "utf-8")
    (folder / "engine.plan").write_bytes(PLAN)
    return folder
