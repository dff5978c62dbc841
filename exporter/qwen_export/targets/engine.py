"""`build_engine`: from a bundle to an engine in it. Read it as a table of contents.

The engine's folder takes its name in the bundle only when it is complete. The bundle's own files
are read and not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import cast

import onnx_ir as ir

from qwen_export.errors import OutputError, TargetError
from qwen_export.progress import Progress, no_progress
from qwen_export.staging import install, staging_folder
from qwen_export.targets.engine_cache import EngineCache, cache_key
from qwen_export.targets.flavours import Target, load_target, select_sms
from qwen_export.targets.options import EngineOptions, EngineSizes
from qwen_export.targets.plan import Plan
from qwen_export.targets.profiles import Profile
from qwen_export.targets.ranges import check_float16_range
from qwen_export.targets.tensorrt import build_plan, engine_graph, serialize
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import (
    ENGINE_FILE,
    EngineDescription,
    EngineProfile,
    KernelEntry,
    Phase,
    PlanEntry,
    SizeEntry,
)
from qwen_runtime.engine_file import ENGINES_FOLDER, EngineFolder

__all__ = ["build_engine", "check_target"]

_FIXED_SCRATCH_BYTES = 16 << 20
"""More than the decode of any small model wants."""
_SCRATCH_SHARE = 0.25
"""Scratch memory against weights: a 0.5B shape takes 0.01 in bf16, 0.9 in int4, where the int8
table is unpacked, and 2.0 in int8."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One plan that is to be built."""

    file: str
    graph: Phase
    profiles: list[Profile]
    model: ir.Model
    """The lowered graph; its weights are read when it is parsed."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Everything an engine is built from."""

    bundle: Bundle
    target: Target
    options: EngineOptions
    sizes: EngineSizes
    sms: tuple[int, ...]
    parts: tuple[_Part, ...]

    @property
    def inputs(self) -> dict[str, str]:
        """sha256 of the bundle's files that are read, by name."""
        manifest = self.bundle.manifest
        names = [manifest.graphs[part.graph].file for part in self.parts]
        return {name: manifest.files[name].sha256 for name in (*names, manifest.weights.file)}

    @property
    def built_for(self) -> tuple[int, ...]:
        """GPUs the builder is told of; the enterprise TensorRT builds for the one at hand."""
        return self.sms if self.target.flavour == "tensorrt-rtx" else ()

    @property
    def key(self) -> str:
        """A name that changes with anything that could change the engine."""
        return cache_key(
            {
                "flavour": self.target.flavour,
                "version": self.target.version,
                "producer": _producer(),
                "inputs": self.inputs,
                "options": self.command,
                "sms": self.sms,
                "plans": [
                    {
                        "file": part.file,
                        "graph": hashlib.sha256(serialize(part.model)[0]).hexdigest(),
                        "profiles": [asdict(profile) for profile in part.profiles],
                    }
                    for part in self.parts
                ],
            }
        )

    @property
    def command(self) -> tuple[str, ...]:
        """The command-line options that ask for it."""
        return self.options.command(self.target.flavour, self.sizes, self.built_for or None)


def check_target(name: str, options: EngineOptions | None = None) -> None:
    """Refuse a target before anything is built for it.

    Raises:
        TargetError: If it is unknown, is not installed, or cannot build for the GPUs.
    """
    select_sms(load_target(name), (options or EngineOptions()).sms)


def build_engine(
    bundle: Bundle,
    target: str,
    options: EngineOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> EngineFolder:
    """Build a TensorRT engine into a bundle, or take the same one built before from the cache.

    Args:
        bundle: An opened bundle with fp32 compute.
        target: "tensorrt-rtx", which needs no GPU, or "tensorrt", which was never run.
        options: Type, limits and GPUs.
        overwrite: Replace an engine of this target.
        progress: Where to report long steps.

    Returns:
        The engine in ``engines/<target>``.

    Raises:
        TargetError: If the target cannot be used, the options contradict the bundle, or the
            engine would give wrong numbers.
        OutputError: If there is such an engine already, one appears during the build, or it
            cannot be written.
        BundleError: If the bundle is damaged.
    """
    options = options or EngineOptions()
    output = bundle.path.absolute() / ENGINES_FOLDER / target
    loaded = load_target(target)
    recipe = _recipe(bundle, loaded, options)
    _require_absent(output, overwrite=overwrite)
    size = sum(entry.num_bytes for entry in bundle.manifest.files.values())
    with progress("Hashing", size, unit="B") as advance:
        bundle.check_hashes(advance)
    cache = EngineCache.of_user()
    with staging_folder(output) as folder:
        if cache is None or not cache.fetch(recipe.key, folder):
            _write_engine(recipe, folder, progress)
            if cache is not None:
                cache.add(recipe.key, folder)
        install(folder, output, overwrite=overwrite, refuse=_require_still_absent)
    return EngineFolder.open(bundle, target)


def _recipe(bundle: Bundle, target: Target, options: EngineOptions) -> _Recipe:
    sizes = options.sizes(bundle.manifest)
    sms = select_sms(target, options.sms)
    phases: tuple[Phase, ...] = ("prefill", "decode")
    plans: list[tuple[str, Phase, tuple[Phase, ...]]] = [("engine.plan", "prefill", phases)]
    if options.separate:
        plans = [(f"{phase}.plan", phase, (phase,)) for phase in phases]
    parts = tuple(
        _Part(
            file,
            graph,
            sizes.profiles(served, graph),
            engine_graph(bundle, graph, dtype=options.compute_dtype, capacity=sizes.capacity),
        )
        for file, graph, served in plans
    )
    return _Recipe(bundle, target, options, sizes, sms, parts)


def _write_engine(recipe: _Recipe, folder: Path, progress: Progress) -> None:
    fp16_range = None
    if recipe.options.compute_dtype == "fp16":
        fp16_range = check_float16_range(recipe.bundle, progress=progress)
    entries: list[PlanEntry] = []
    aliases: dict[str, str] = {}
    warnings: list[str] = []
    for part in recipe.parts:
        # One plan in memory at a time.
        plan = build_plan(
            recipe.target.module,
            part.model,
            part.profiles,
            num_hidden_layers=recipe.bundle.manifest.model.num_hidden_layers,
            sms=recipe.built_for,
            progress=progress,
        )
        _require_sms(plan, recipe.sms)
        (folder / part.file).write_bytes(plan.data)
        entries.append(_plan_entry(part, plan))
        aliases |= plan.network.aliases
        warnings += [*plan.warnings, *_scratch_warnings(recipe.bundle, entries[-1])]
        del plan
    description = EngineDescription(
        producer=_producer(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        flavour=recipe.target.flavour,
        version=recipe.target.version,
        sms=recipe.sms,
        compute_dtype=recipe.options.compute_dtype,
        capacity=recipe.sizes.capacity,
        max_batch=recipe.sizes.max_batch,
        max_sequence=recipe.sizes.max_sequence,
        max_num_logits=recipe.sizes.max_num_logits,
        inputs=recipe.inputs,
        options=recipe.command,
        aliases=aliases,
        plans=tuple(entries),
        warnings=tuple(dict.fromkeys(warnings)),
        fp16_range=fp16_range,
    )
    (folder / ENGINE_FILE).write_text(description.to_json(), "utf-8")


def _require_sms(plan: Plan, sms: tuple[int, ...]) -> None:
    if plan.header is not None and plan.header.sms != sms:
        raise TargetError(
            f"the plan must serve SM {', '.join(map(str, sms))}, but its header says "
            f"{', '.join(map(str, plan.header.sms)) or 'none'}"
        )


def _plan_entry(part: _Part, plan: Plan) -> PlanEntry:
    # A builder that reports none, or not one for each profile, is not guessed about.
    known = len(plan.activation_bytes) == len(part.profiles)
    activations: Sequence[int | None] = (
        plan.activation_bytes if known else [None] * len(part.profiles)
    )
    return PlanEntry(
        file=part.file,
        graph=part.graph,
        sha256=hashlib.sha256(plan.data).hexdigest(),
        num_bytes=len(plan.data),
        weight_bytes=plan.weight_bytes,
        graph_weight_bytes=plan.graph_weight_bytes,
        profiles=tuple(
            EngineProfile(
                cast("Phase", profile.name),
                {name: SizeEntry(r.min, r.opt, r.max) for name, r in profile.sizes.items()},
                num_bytes,
            )
            for profile, num_bytes in zip(part.profiles, activations, strict=True)
        ),
        kernels=tuple(KernelEntry(kernel.name, kernel.kind) for kernel in plan.kernels),
    )


def _scratch_warnings(bundle: Bundle, plan: PlanEntry) -> list[str]:
    """Say so where decode unpacks weights that lie packed in the plan."""
    if bundle.manifest.quantization is None or plan.weight_bytes is None:
        return []
    limit = _FIXED_SCRATCH_BYTES + _SCRATCH_SHARE * plan.weight_bytes
    found = [each.activation_bytes or 0 for each in plan.profiles if each.name == "decode"]
    return [
        f"decode needs {scratch / 1e6:,.0f} MB of scratch memory beside "
        f"{plan.weight_bytes / 1e6:,.0f} MB of weights: TensorRT unpacks quantised weights there "
        "at every step instead of inside its kernels, which costs time and memory"
        for scratch in found
        if scratch > limit
    ]


def _producer() -> str:
    return f"qwen-export {metadata.version('qwen-export')}"


def _require_absent(output: Path, *, overwrite: bool) -> None:
    """Refuse an engine that exists, unless it may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(
            f"{output} exists; pass --overwrite to build the engine again", path=output
        )
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and not (output / ENGINE_FILE).is_file():
        raise OutputError(
            f"{output} exists and is not an engine (it has no {ENGINE_FILE}), so --overwrite does "
            "not replace it; move it out of the bundle",
            path=output,
        )


def _require_still_absent(output: Path, *, overwrite: bool) -> None:
    try:
        _require_absent(output, overwrite=overwrite)
    except OutputError as error:
        if overwrite:
            raise
        raise OutputError(
            f"{output} was built by another process meanwhile; that engine stays, and this one "
            "was thrown away",
            path=output,
        ) from error
