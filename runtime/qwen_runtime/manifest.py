"""manifest.json: what a bundle is, in one validated document.

The JSON Schema is `manifest.schema.json` beside this file; docs/bundle.md explains every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from qwen_runtime.errors import BundleError

__all__ = [
    "MANIFEST_FILE",
    "SCHEMA_VERSION",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ModelEntry",
    "ParitySummary",
    "QualitySummary",
    "QuantizationEntry",
    "QuantizedGroup",
    "TensorEntry",
    "TokenizerEntry",
    "WeightsEntry",
]

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 2
"""Of what is written; 1, which knew no quantised weights, is still read."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """Dimensions of the decoder, read from the checkpoint and never derived again."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_type: str
    rope_theta: float


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """An input or output of a graph."""

    name: str
    dtype: str
    """ONNX's name of the element type, in lower case: "int64", "float"."""
    shape: tuple[int | str, ...]
    """Sizes; a string names a dynamic dimension."""


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """One ONNX graph."""

    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """The one weights file."""

    file: str
    num_tensors: int
    """Tensors of the file; the scales of a quantised weight are one of their own."""
    tied: bool
    """Whether logits come from the embedding table, stored once."""


@dataclass(frozen=True, slots=True)
class QuantizedGroup:
    """Weights of one kind, and what became of them."""

    role: Literal["linear", "embedding", "lm_head", "tied table", "float"]
    """"float": norms, biases and rotary tables."""
    format: Literal["fp32", "int8", "int4"]
    block_size: int | None
    """Inputs that share a scale; None for floats."""
    method: Literal["rtn", "search", "gptq", "imported"] | None
    """What chose codes and scales; "imported" are those of the checkpoint. None for floats."""
    num_tensors: int
    """Weights, each with its scales counted once."""
    num_bytes: int
    """Of codes and scales."""


@dataclass(frozen=True, slots=True)
class QuantizationEntry:
    """How the weights were quantised."""

    bits: int | None
    """Of the linear layers' weights that were quantised here; None where there are none, because
    the checkpoint brought its codes."""
    block_size: int | None
    """Inputs that share a scale in them; None where there are none, or not all are alike."""
    method: Literal["rtn", "search", "gptq"] | None
    """What chose their codes and scales; None where there are none."""
    calibration_sha256: str | None
    """Of the text that "gptq" was calibrated on; None for other methods."""
    groups: tuple[QuantizedGroup, ...]
    """Every kind of weight."""


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """What tokenizer.json does not say."""

    special_tokens: dict[str, str]
    """Role ("eos_token", ...) to text; only those that are set."""
    split_special_tokens: bool
    model_max_length: int | None
    chat_templates: dict[str, str]
    """Template name to file; "default" is the one used unless tools select "tool_use"."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A core file of the bundle."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class QualitySummary:
    """How far a quantised bundle, as it is served, is from the checkpoint it was built from."""

    positions: int
    """Positions compared."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of its next-token distribution from the original's, in
    nats."""
    max_kl: float
    top1_agreement: float
    """Share of positions at which both choose the same token."""
    max_logit_error: float
    """Largest max|difference| / max|original| of any position."""
    served_error: float
    """Largest max|difference| / max|exact| between the bundle as it is served and computed in
    fp32: what int8 activations cost."""
    mean_served_error: float
    """Mean of it over the positions."""


@dataclass(frozen=True, slots=True)
class ParitySummary:
    """Whether the bundle answered like the original when it was built."""

    status: Literal["passed", "failed", "not_verified"]
    max_logit_error: float | None = None
    """Largest max|difference| / max|reference| of any position; the reference of a quantised
    bundle is the original with the bundle's own weights."""
    tolerance: float | None = None
    tokens_compared: int = 0
    ties: int = 0
    quality: QualitySummary | None = None
    """Of a quantised bundle."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A bundle's manifest.json."""

    producer: str
    created: str
    """UTC, ISO 8601."""
    source: str
    """Checkpoint name: a folder's last part or a hub id."""
    revision: str | None
    model: ModelEntry
    precision: str
    compute_dtype: str
    max_context: int
    """Longest row the graphs can hold, in tokens: rows of the rotary tables."""
    graphs: dict[str, GraphEntry]
    weights: WeightsEntry
    tokenizer: TokenizerEntry | None
    minimum_engine_versions: dict[str, str]
    tools: dict[str, str]
    parity: ParitySummary
    quantization: QuantizationEntry | None = None
    """None for a bundle of float weights."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The document, validated.

        Raises:
            BundleError: If a field breaks the schema.
        """
        try:
            raw = json.loads(json.dumps(asdict(self), allow_nan=False))
        except ValueError as error:
            raise _damaged(f"every number must be finite: {error}", None) from error
        _validate(raw, None)
        return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and validate ``folder/manifest.json``.

        Raises:
            BundleError: If it is missing, is no JSON, is newer than this runtime, or breaks the
                schema.
        """
        path = folder / MANIFEST_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except FileNotFoundError:
            raise BundleError(
                f"{folder} must be a bundle, but has no {MANIFEST_FILE}; build one with "
                f"`qwen-export build MODEL --output {folder}`",
                path=path,
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} must be readable JSON: {error}", path=path) from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version must be at most {SCHEMA_VERSION}, got {version}; "
                "install a newer qwen-export or rebuild the bundle with this one",
                path=path,
            )
        _validate(raw, path)
        return cls._from_raw(raw)

    @classmethod
    def _from_raw(cls, raw: Mapping[str, Any]) -> Manifest:
        data = dict(raw)
        data["model"] = ModelEntry(**raw["model"])
        data["graphs"] = {name: _graph(entry) for name, entry in raw["graphs"].items()}
        data["weights"] = WeightsEntry(**raw["weights"])
        data["tokenizer"] = raw["tokenizer"] and TokenizerEntry(**raw["tokenizer"])
        quality = raw["parity"].get("quality")
        data["parity"] = ParitySummary(
            **raw["parity"] | {"quality": quality and QualitySummary(**quality)}
        )
        data["quantization"] = raw.get("quantization") and _quantization(raw["quantization"])
        data["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return cls(**data)


def _quantization(raw: Mapping[str, Any]) -> QuantizationEntry:
    groups = tuple(QuantizedGroup(**group) for group in raw["groups"])
    return QuantizationEntry(**{**raw, "groups": groups})


def _graph(raw: Mapping[str, Any]) -> GraphEntry:
    def tensors(entries: list[dict[str, Any]]) -> tuple[TensorEntry, ...]:
        return tuple(TensorEntry(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)

    return GraphEntry(raw["file"], tensors(raw["inputs"]), tensors(raw["outputs"]))


def _refuse_constant(name: str) -> None:
    """Python's reader takes NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no number in JSON")


@cache
def _validator() -> Any:
    import jsonschema  # a fifth of a second that --help need not pay

    schema = json.loads(
        resources.files("qwen_runtime").joinpath("manifest.schema.json").read_text("utf-8")
    )
    return jsonschema.Draft202012Validator(schema)


def _validate(raw: object, path: Path | None) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(_validator().iter_errors(raw))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        raise _damaged(f"{where}: {error.message}", path)
    data = cast("dict[str, Any]", raw)
    quantized = data["precision"] in ("int8", "int4")
    if quantized != (data.get("quantization") is not None):
        needs = "an entry" if quantized else "no entry"
        raise _damaged(f"quantization: precision {data['precision']} needs {needs}", path)


def _damaged(reason: str, path: Path | None) -> BundleError:
    return BundleError(
        f"{path or MANIFEST_FILE}: {reason}; the manifest is damaged or was edited: rebuild the "
        "bundle",
        path=path,
    )
