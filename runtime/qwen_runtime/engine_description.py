"""engine.json: what a TensorRT engine in a bundle is, readable without TensorRT.

::

    BUNDLE/engines/<name>/engine.json     this document
                          engine.plan     one engine with a profile for prefill and one for decode,
                          prefill.plan    or an engine each
                          decode.plan

The JSON Schema is `engine.schema.json` beside this file; docs/tensorrt.md explains every field. `qwen_runtime.engine_file` opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from qwen_runtime.errors import BundleError

__all__ = [
    "ENGINE_FILE",
    "ENGINE_SCHEMA_VERSION",
    "EngineDescription",
    "EngineProfile",
    "Flavour",
    "KernelEntry",
    "Phase",
    "PlanEntry",
    "RangeEntry",
    "SizeEntry",
]

ENGINE_FILE = "engine.json"
ENGINE_SCHEMA_VERSION = 1

Flavour = Literal["tensorrt-rtx", "tensorrt"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class SizeEntry:
    """Sizes a dimension may take."""

    min: int
    opt: int
    """The size kernels were chosen for."""
    max: int


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One optimisation profile of a plan."""

    name: Phase
    """What it is for. A plan's profiles are numbered in the order they are listed."""
    sizes: dict[str, SizeEntry]
    """By dimension: "batch", and on the prefill graph "sequence" and "num_logits"."""
    activation_bytes: int | None
    """Scratch memory its kernels need, as the builder reported it; None where it did not."""


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """One step of an engine, as the builder reported it."""

    name: str
    kind: str
    """The builder's own word: "gemm", "kgen", ..."""


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One serialised engine."""

    file: str
    """Name in the engine's folder."""
    graph: Phase
    """Which of the bundle's graphs it was built from; that gives its inputs and outputs."""
    sha256: str
    num_bytes: int
    weight_bytes: int | None
    """Of the weights in the plan; None where neither the plan nor the builder tells."""
    graph_weight_bytes: int
    """Of the graph's weights in the form they were handed over, each counted once."""
    profiles: tuple[EngineProfile, ...]
    kernels: tuple[KernelEntry, ...]
    """Profile after profile, in order of execution."""


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """How near to float16's largest number the activations came on the calibration prompts."""

    largest: float
    """Largest magnitude of any value that the engine computes in float16."""
    node: str
    """The node it was found at."""
    tokens: int
    """Tokens looked at."""


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """An engine.json."""

    producer: str
    created: str
    """UTC, ISO 8601."""
    flavour: Flavour
    """Which TensorRT built it and runs it."""
    version: str
    """The only release of it that runs the plans."""
    sms: tuple[int, ...]
    """GPU generations it runs on: 89 is compute capability 8.9."""
    compute_dtype: Literal["bf16", "fp16"]
    """Type of activations and caches; logits are float32."""
    capacity: int
    """Slots of every cache row, in tokens: past + new tokens, padding included, fit in it."""
    max_batch: int
    """Rows of one call."""
    max_sequence: int
    """New tokens per row of one prefill call, padding included."""
    max_num_logits: int
    """Positions per row whose logits one prefill call returns."""
    inputs: dict[str, str]
    """sha256 of the bundle's files it was built from, by name."""
    options: tuple[str, ...]
    """Command-line options that build it again."""
    aliases: dict[str, str]
    """Cache output to the cache input it is written to in place: both are bound to one buffer."""
    plans: tuple[PlanEntry, ...]
    """One for both phases, or one each."""
    warnings: tuple[str, ...]
    """What the builder warned of; none that it knows to change numbers, which are errors."""
    fp16_range: RangeEntry | None = None
    """None for bf16, which has float32's range."""
    parity: Literal["not_executed"] = "not_executed"
    """Nothing was executed when it was built: the machine that built it needs no GPU."""
    backend: Literal["tensorrt"] = "tensorrt"
    schema_version: int = ENGINE_SCHEMA_VERSION

    def profile(self, phase: Phase) -> tuple[PlanEntry, int]:
        """The plan that serves a phase, and the number of the profile for it.

        Raises:
            BundleError: If there is none.
        """
        for plan in self.plans:
            for index, profile in enumerate(plan.profiles):
                if profile.name == phase:
                    return plan, index
        raise BundleError(
            f"{ENGINE_FILE}: a profile for {phase} must be listed, but none is; build the engine "
            "again"
        )

    def to_json(self) -> str:
        """The document, validated.

        Raises:
            BundleError: If a field breaks the schema.
        """
        raw = json.loads(json.dumps(asdict(self)))
        _validate(raw, None)
        return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> EngineDescription:
        """Read and validate ``folder/engine.json``.

        Raises:
            BundleError: If it is missing, is no JSON, is newer than this runtime, or breaks the
                schema.
        """
        path = folder / ENGINE_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} must be readable JSON: {error}", path=path) from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > ENGINE_SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version must be at most {ENGINE_SCHEMA_VERSION}, got {version}; "
                "install a newer qwen-export or build the engine with this one",
                path=path,
            )
        _validate(raw, path)
        return cls._from_raw(raw)

    @classmethod
    def _from_raw(cls, raw: Mapping[str, Any]) -> EngineDescription:
        data = dict(raw)
        for name in ("sms", "options", "warnings"):
            data[name] = tuple(raw[name])
        data["plans"] = tuple(_plan(plan) for plan in raw["plans"])
        data["fp16_range"] = raw["fp16_range"] and RangeEntry(**raw["fp16_range"])
        return cls(**data)


def _plan(raw: Mapping[str, Any]) -> PlanEntry:
    profiles = tuple(
        EngineProfile(
            each["name"],
            {name: SizeEntry(**sizes) for name, sizes in each["sizes"].items()},
            each["activation_bytes"],
        )
        for each in raw["profiles"]
    )
    kernels = tuple(KernelEntry(**each) for each in raw["kernels"])
    return PlanEntry(**{**raw, "profiles": profiles, "kernels": kernels})


@cache
def _validator() -> Any:
    import jsonschema  # a fifth of a second that --help need not pay

    schema = resources.files("qwen_runtime").joinpath("engine.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(schema))


def _validate(raw: object, path: Path | None) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(_validator().iter_errors(raw))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        raise BundleError(
            f"{path or ENGINE_FILE}: {where}: {error.message}; the file is damaged or was edited: "
            "build the engine again with --overwrite",
            path=path,
        )
