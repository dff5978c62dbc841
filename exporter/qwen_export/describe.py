"""A bundle's manifest, put together from what was built."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from qwen_export.checkpoint import Checkpoint, TokenizerFiles, Tying
from qwen_export.formats import role_of
from qwen_export.model.parameters import Parameter
from qwen_export.trace import Phase
from qwen_export.weights import QuantizedSource, Source, WeightsFile
from qwen_runtime.bundle import sha256_of
from qwen_runtime.lowered_file import LOWERED_FOLDER
from qwen_runtime.manifest import (
    MANIFEST_FILE,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    ParitySummary,
    QuantizationEntry,
    QuantizedGroup,
    TensorEntry,
    TokenizerEntry,
    WeightsEntry,
)

__all__ = [
    "describe",
    "describe_quantization",
    "source_name",
    "template_files",
    "write_manifest",
]

T = TypeVar("T")

MINIMUM_ONNXRUNTIME = "1.31.0"
"""The first release tested with opset 24's TensorScatter and Attention in place."""


def source_name(checkpoint: Checkpoint, model: str | Path | None) -> str:
    """A checkpoint's name: the hub id, or the folder's last part."""
    local = model is None or Path(model).exists()
    return checkpoint.path.resolve().name if local else str(model)


def template_files(tokenizer: TokenizerFiles) -> dict[str, str]:
    """Where a bundle keeps each chat template, by the template's name."""
    return {
        name: "chat_template.jinja"
        if name == "default"
        else f"additional_chat_templates/{name}.jinja"
        for name in tokenizer.chat_templates
    }


def describe(
    checkpoint: Checkpoint,
    tying: Tying,
    tokenizer: TokenizerFiles | None,
    graphs: Mapping[Phase, ir.Model],
    weights: WeightsFile,
    *,
    max_context: int,
    precision: str,
    compute_dtype: str,
    source: str,
    quantization: QuantizationEntry | None = None,
) -> Manifest:
    """The manifest of a bundle that is not yet verified, its files not yet listed."""
    config = checkpoint.config
    return Manifest(
        producer=f"qwen-export {metadata.version('qwen-export')}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        revision=checkpoint.revision,
        model=ModelEntry(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=tying.tied,
            rope_type=config.rope.rope_type,
            rope_theta=config.rope.rope_theta,
        ),
        precision=precision,
        compute_dtype=compute_dtype,
        max_context=max_context,
        graphs={phase: _graph_entry(phase, graph) for phase, graph in graphs.items()},
        weights=WeightsEntry(weights.path.name, len(weights.tensors), tying.tied),
        tokenizer=None if tokenizer is None else _tokenizer_entry(tokenizer),
        minimum_engine_versions={"onnxruntime": MINIMUM_ONNXRUNTIME},
        tools={
            name: metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")
        },
        parity=ParitySummary("not_verified"),
        quantization=quantization,
    )


def describe_quantization(
    wanted: Iterable[Parameter],
    sources: Iterable[Source],
    *,
    tied: bool,
    calibration: Path | None = None,
) -> QuantizationEntry:
    """What became of every weight.

    Args:
        wanted: The tensors of the graphs.
        sources: What was written for them.
        tied: Whether the embedding is the output projection too.
        calibration: The text that linear layers were calibrated on.
    """
    roles = {parameter.name: role_of(parameter, tied=tied) for parameter in wanted}
    groups: dict[QuantizedGroup, list[int]] = defaultdict(list)
    made: list[QuantizedSource] = []
    for source in sources:
        kind = QuantizedGroup(roles[source.name], "fp32", None, None, 0, 0)
        if isinstance(source, QuantizedSource):
            form = source.format
            kind = replace(
                kind, format=form.name, block_size=form.block_size, method=source.method
            )
            if kind.role == "linear" and source.method != "imported":
                made.append(source)
        groups[kind].append(source.num_bytes)
    return QuantizationEntry(
        _sole(source.format.bits for source in made),
        _sole(source.format.block_size for source in made),
        _sole(source.method for source in made if source.method != "imported"),
        None if calibration is None else sha256_of(calibration),
        tuple(
            replace(kind, num_tensors=len(sizes), num_bytes=sum(sizes))
            for kind, sizes in groups.items()
        ),
    )


def _sole(values: Iterable[T]) -> T | None:
    """The value that all have; None where there are none or several."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _tokenizer_entry(tokenizer: TokenizerFiles) -> TokenizerEntry:
    return TokenizerEntry(
        dict(tokenizer.special_tokens),
        tokenizer.split_special_tokens,
        tokenizer.model_max_length,
        template_files(tokenizer),
    )


def _graph_entry(phase: Phase, graph: ir.Model) -> GraphEntry:
    def entries(values: list[ir.Value]) -> tuple[TensorEntry, ...]:
        return tuple(
            TensorEntry(
                str(value.name),
                str(value.dtype).lower(),
                tuple(
                    dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()
                ),
            )
            for value in values
        )

    return GraphEntry(
        f"{phase}.onnx", entries(list(graph.graph.inputs)), entries(list(graph.graph.outputs))
    )


def write_manifest(manifest: Manifest, folder: Path, hashes: Mapping[str, str]) -> None:
    """Hash every core file in the folder, all but those already hashed, and write the manifest.

    Lowered graphs are no core files: they are listed and hashed in a document of their own.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if path.is_file() and name != MANIFEST_FILE and relative.parts[0] != LOWERED_FOLDER:
            files[name] = FileEntry(hashes.get(name) or sha256_of(path), path.stat().st_size)
    (folder / MANIFEST_FILE).write_text(replace(manifest, files=files).to_json(), "utf-8")
