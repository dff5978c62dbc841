"""`lower_bundle`: from a bundle to ``lowered/<target>`` in it.

The folder takes its name in the bundle only when it is complete. The bundle's own files are read
and not changed, and its weights are not copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from qwen_export.errors import OutputError, TargetError
from qwen_export.lowering.graph import LoweredGraph, lower_graph
from qwen_export.lowering.options import CPU_OPTIONS, LoweringOptions, Target
from qwen_export.lowering.top_logits import top_logits_graph
from qwen_export.progress import Progress, no_progress
from qwen_export.staging import install, staging_folder
from qwen_export.targets.ranges import check_float16_range
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_description import (
    LOWERED_FILE,
    GraphName,
    InitializerEntry,
    LoweredDescription,
)
from qwen_runtime.lowered_file import LOWERED_FOLDER, LoweredFolder
from qwen_runtime.manifest import FileEntry, GraphEntry, TensorEntry

__all__ = ["TARGETS", "lower_bundle", "require_codes"]

TARGETS: tuple[Target, ...] = get_args(Target)
"""What a bundle can be lowered to."""
_PHASES: dict[Target, tuple[Literal["prefill", "decode"], ...]] = {
    "cpu": ("prefill",),
    "cuda": ("prefill", "decode"),
}
"""Graphs of a target. On the CPU, where every session packs its weights, one serves both phases."""
_CODES = ("int8", "int4")
_MINIMUM_VERSIONS = {"onnxruntime": "1.31"}
"""Where the operators' types and attributes were looked up."""


def lower_bundle(
    bundle: Bundle,
    target: str,
    options: LoweringOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> LoweredFolder:
    """Rewrite a bundle's graphs for an engine and put them into the bundle.

    Args:
        bundle: An opened bundle.
        target: "cuda", or "cpu" for a bundle of int8 or int4 weights.
        options: Type of activations and caches, form of attention, and how many logits are brought
            for sampling; None for the target's own.
        overwrite: Replace the graphs of this target.
        progress: Where to report long steps.

    Returns:
        The graphs in ``lowered/<target>``.

    Raises:
        TargetError: If the target is unknown, an operator does not take the model, or its numbers
            do not fit into float16.
        OutputError: If there are such graphs already, some appear meanwhile, or they cannot be
            written.
        BundleError: If the bundle is damaged.
    """
    if target not in TARGETS:
        raise TargetError(
            f"target must be {' or '.join(TARGETS)} to be lowered to, got {target}", names=[target]
        )
    known: Target = target
    options = options or (CPU_OPTIONS if known == "cpu" else LoweringOptions())
    if known == "cpu":
        _check_for_cpu(bundle, options)
    output = bundle.path.absolute() / LOWERED_FOLDER / target
    _require_absent(output, overwrite=overwrite)
    if options.compute_dtype == "fp16":
        check_float16_range(bundle, progress=progress)
    graphs: dict[GraphName, LoweredGraph] = {}
    for phase in _PHASES[known]:
        with progress(f"Lowering {phase} for {target}"):
            graphs[phase] = lower_graph(bundle, phase, options, known)
    if known == "cuda" and options.num_top:
        top = top_logits_graph(bundle.manifest.model.vocab_size, options.num_top)
        graphs["top_logits"] = LoweredGraph(top, ())
    with staging_folder(output) as folder:
        for name, graph in graphs.items():
            graph.model.producer_name = "qwen-export"
            graph.model.producer_version = metadata.version("qwen-export")
            ir.save(graph.model, folder / f"{name}.onnx")
        files = [f"{name}.onnx" for name in graphs]
        description = LoweredDescription(
            producer=f"qwen-export {metadata.version('qwen-export')}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            target=known,
            compute_dtype=options.compute_dtype,
            attention=options.form,
            weights_sha256=bundle.manifest.files[bundle.manifest.weights.file].sha256,
            options=options.command(known),
            minimum_engine_versions=_MINIMUM_VERSIONS,
            graphs={name: _graph_entry(name, graph) for name, graph in graphs.items()},
            initializers=_merged(graphs.values()),
            files={name: _file_entry(folder / name) for name in files},
        )
        (folder / LOWERED_FILE).write_text(description.to_json(), "utf-8")
        install(folder, output, overwrite=overwrite, refuse=_require_still_absent)
    return LoweredFolder.open(bundle, target)


def require_codes(bundle: Path, precision: str) -> None:
    """Refuse weights that have no graph for the CPU but the portable ones.

    Args:
        bundle: The bundle's folder, for the message.
        precision: Format of its weights.

    Raises:
        TargetError: If that is neither int8 nor int4.
    """
    if precision not in _CODES:
        raise TargetError(
            f"{bundle} must have int8 or int4 weights to be lowered for cpu, got {precision}: its "
            "portable graphs map float weights from weights.bin, and rearranged ones would be held "
            "in memory",
            names=["cpu"],
        )


def _check_for_cpu(bundle: Bundle, options: LoweringOptions) -> None:
    require_codes(bundle.path, bundle.manifest.precision)
    if (options.compute_dtype, options.form) != (CPU_OPTIONS.compute_dtype, CPU_OPTIONS.form):
        raise TargetError(
            "graphs for cpu must compute in fp32 with group_query attention, got "
            f"{options.compute_dtype} with {options.form}",
            names=["cpu"],
        )


def _merged(graphs: Iterable[LoweredGraph]) -> tuple[InitializerEntry, ...]:
    """Every initializer of either graph once; one name must mean one tensor."""
    merged: dict[str, InitializerEntry] = {}
    for graph in graphs:
        for entry in graph.initializers:
            if merged.setdefault(entry.name, entry) != entry:
                raise AssertionError(f"{entry.name} must be the same tensor in both graphs")
    return tuple(merged.values())


def _graph_entry(name: str, graph: LoweredGraph) -> GraphEntry:
    def entries(values: Iterable[ir.Value]) -> tuple[TensorEntry, ...]:
        return tuple(_tensor_entry(value) for value in values)

    return GraphEntry(
        f"{name}.onnx", entries(graph.model.graph.inputs), entries(graph.model.graph.outputs)
    )


def _tensor_entry(value: ir.Value) -> TensorEntry:
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"{value.name} must have a type and a shape")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorEntry(str(value.name), value.dtype.name.lower(), shape)


def _file_entry(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


def _require_absent(output: Path, *, overwrite: bool) -> None:
    """Refuse graphs that exist, unless they may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{output} exists; pass --overwrite to make it again", path=output)
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and not (output / LOWERED_FILE).is_file():
        raise OutputError(
            f"{output} exists and holds no lowered graphs (it has no {LOWERED_FILE}), so "
            "--overwrite does not replace it; move it out of the bundle",
            path=output,
        )


def _require_still_absent(output: Path, *, overwrite: bool) -> None:
    try:
        _require_absent(output, overwrite=overwrite)
    except OutputError as error:
        if overwrite:
            raise
        raise OutputError(
            f"{output} was made by another process meanwhile; that one stays, and this one was "
            "thrown away",
            path=output,
        ) from error
