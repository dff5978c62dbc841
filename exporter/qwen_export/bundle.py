"""`build`: from a checkpoint to a bundle. Read it as a table of contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qwen_export import passes
from qwen_export.checkpoint import (
    Checkpoint,
    TokenizerFiles,
    Tying,
    open_checkpoint,
    require_supported,
)
from qwen_export.describe import describe, source_name, template_files, write_manifest
from qwen_export.errors import ExportError, OutputError, ParityError
from qwen_export.model.parameters import parameters
from qwen_export.progress import Progress, no_progress
from qwen_export.rotary import context_limit, rotary_tables
from qwen_export.staging import install, require_absent, staging_folder
from qwen_export.trace import Phase, trace
from qwen_export.weights import TensorSource, WeightsFile, bind_weights, write_weights
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import Manifest

__all__ = ["EMBEDDED_MODEL", "BuildOptions", "build", "embedded_model"]

EMBEDDED_MODEL = "tiny-qwen2-chat"
PHASES: tuple[Phase, ...] = ("prefill", "decode")
WEIGHTS_FILE = "weights.bin"
_MOST_FAILED = 20
"""Names tried for a bundle that failed."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What `build` is asked for beside the model and the place."""

    precision: str = "fp32"
    """Format of the weights; "fp32" is offered."""
    compute_dtype: str = "fp32"
    """Format of activations and caches; "fp32" is offered."""
    max_context: int | None = None
    """Longest row in tokens; None for the checkpoint's max_position_embeddings."""
    verify: bool = True
    """Prove parity with PyTorch, and refuse to deliver a bundle that fails."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--precision", self.precision),
            ("--compute-dtype", self.compute_dtype),
        ):
            if value != "fp32":
                raise ExportError(f"{option} must be fp32, the only verified one, got {value}")
        if self.max_context is not None and self.max_context < 1:
            raise ExportError(f"--max-context must be at least 1 token, got {self.max_context}")


def embedded_model() -> Path:
    """Folder of the small trained Qwen2 chat model that comes with the package."""
    return Path(str(resources.files("qwen_export").joinpath("data", EMBEDDED_MODEL)))


def build(
    model: str | Path | None,
    output: Path,
    options: BuildOptions | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Build a bundle.

    Threads may build at the same time; they trace one after the other, because tracing changes
    the process's warning filters.

    Args:
        model: A checkpoint's folder or hub id; None for the embedded model.
        output: The bundle's folder. It appears only when the bundle is complete.
        options: Precision, context and verification.
        revision: Branch, tag or commit of a hub id; the manifest records the commit it means.
        overwrite: Replace a bundle at ``output``.
        progress: Where to report long steps.

    Returns:
        The bundle at ``output``.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or contradicts itself.
        UnsupportedModelError: If it asks for something that is not supported.
        OutputError: If ``output`` exists, appears during the build or cannot be written.
        ParityError: If the bundle does not answer like the checkpoint. It is left at
            ``output`` + ".failed", with the report, or where something else is in the way at the
            next free name, ".failed-2", ...; ``output`` itself is not touched.
    """
    options = options or BuildOptions()
    output = output.absolute()
    require_absent(output, overwrite=overwrite)
    checkpoint = open_checkpoint(embedded_model() if model is None else model, revision=revision)
    require_supported(checkpoint.config)
    max_context = context_limit(checkpoint.config, options.max_context)
    tying = checkpoint.resolve_tying()
    tokenizer = checkpoint.tokenizer_files()
    with staging_folder(output) as folder:
        graphs: dict[Phase, ir.Model] = {}
        for phase in PHASES:
            with progress(f"Tracing {phase}"):
                graphs[phase] = trace(
                    checkpoint.config, phase, tied=tying.tied, max_context=max_context
                )
        weights = _write_weights(checkpoint, tying, max_context, folder, progress)
        for phase, graph in graphs.items():
            with progress(f"Checking {phase}"):
                _save_graph(graph, weights, folder / f"{phase}.onnx")
        _write_text_files(checkpoint, tokenizer, folder)
        manifest = describe(
            checkpoint,
            tying,
            tokenizer,
            graphs,
            weights,
            max_context=max_context,
            precision=options.precision,
            compute_dtype=options.compute_dtype,
            source=source_name(checkpoint, model),
        )
        hashes = {WEIGHTS_FILE: weights.sha256}
        write_manifest(manifest, folder, hashes)
        if options.verify:
            _verify(manifest, checkpoint, folder, output, hashes, progress)
        install(folder, output, overwrite=overwrite)
    return Bundle.open(output)


def _write_weights(
    checkpoint: Checkpoint, tying: Tying, max_context: int, folder: Path, progress: Progress
) -> WeightsFile:
    sources = _tensor_sources(checkpoint, tying, max_context)
    stored_as = _stored_names(tying)

    def check(name: str, block: npt.NDArray[np.float32]) -> None:
        if not name.startswith("model.rotary_emb."):
            checkpoint.check_finite(stored_as.get(name, name), block)

    total = sum(source.num_bytes for source in sources)
    with progress("Writing weights", total, unit="B") as advance:
        return write_weights(folder / WEIGHTS_FILE, sources, check=check, progress=advance)


def _tensor_sources(checkpoint: Checkpoint, tying: Tying, max_context: int) -> list[TensorSource]:
    cos, sin = rotary_tables(checkpoint.config, max_context)
    tables = {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin}
    stored_as = _stored_names(tying)
    sources = []
    for parameter in parameters(checkpoint.config, tied=tying.tied, max_context=max_context):
        name = parameter.name
        if name in tables:
            source = TensorSource(name, parameter.shape, partial(tables.__getitem__, name))
        else:
            stored = stored_as.get(name, name)
            source = TensorSource(
                name,
                parameter.shape,
                read=partial(checkpoint.read, stored),
                transposed=parameter.transposed,
                done=partial(checkpoint.release, stored),
            )
        sources.append(source)
    return sources


def _stored_names(tying: Tying) -> dict[str, str]:
    """Where the checkpoint keeps tensors that the graphs know by another name."""
    return {"model.embed_tokens.weight": tying.embedding, "lm_head.weight": tying.lm_head}


def _save_graph(graph: ir.Model, weights: WeightsFile, path: Path) -> None:
    bind_weights(graph, weights)
    passes.infer_shapes(graph)
    graph.producer_name, graph.producer_version = "qwen-export", metadata.version("qwen-export")
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)


def _write_text_files(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles | None, folder: Path
) -> None:
    (folder / "generation_config.json").write_text(_json(checkpoint.generation_config), "utf-8")
    if tokenizer is None:
        return
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json, "utf-8")
    for name, file in template_files(tokenizer).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(tokenizer.chat_templates[name], "utf-8")


def _verify(
    manifest: Manifest,
    checkpoint: Checkpoint,
    folder: Path,
    output: Path,
    hashes: Mapping[str, str],
    progress: Progress,
) -> None:
    # transformers costs seconds to import; a build without verification does not need it.
    from qwen_export.parity import verify

    report = verify(Bundle.open(folder), checkpoint, progress=progress)
    report.write(folder)
    tools = manifest.tools | {"transformers": metadata.version("transformers")}
    verified = replace(manifest, parity=report.summary(), tools=tools)
    write_manifest(verified, folder, hashes)
    if not report.passed:
        failed = _keep_failed(folder, output)
        where = f"are in {failed}" if failed else "could not be kept; make room beside the output"
        raise ParityError(
            f"the exported model does not answer like the original: {report.first_departure}; "
            f"the bundle and its report {where}",
            path=failed,
        )


def _keep_failed(folder: Path, output: Path) -> Path | None:
    """Leave a failed bundle beside the output: over an older failure, or under a free name."""
    for number in range(1, _MOST_FAILED + 1):
        suffix = ".failed" if number == 1 else f".failed-{number}"
        failed = output.with_name(output.name + suffix)
        try:
            install(folder, failed, overwrite=number == 1)
        except (OutputError, OSError):
            # Where a failed bundle is kept must not hide that it failed.
            continue
        return failed
    return None


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
