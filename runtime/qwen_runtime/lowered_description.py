"""lowered.json: a bundle's graphs rewritten for one engine, over the same weights file.

::

    BUNDLE/lowered/<target>/lowered.json     this document
                            prefill.onnx     graphs only
                            decode.onnx      not for the CPU, where one graph serves both
                            top_logits.onnx  for CUDA: finds the highest logits of a step

The graphs hold no weights. Each of their large initialisers is described here: which tensors of
the bundle's weights file it is made of, and how. Whoever loads the graphs makes them, once for
both. The JSON Schema is `lowered.schema.json` beside this file; docs/cuda.md explains every field.
`qwen_runtime.lowered_file` opens the folder.
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
from qwen_runtime.manifest import FileEntry, GraphEntry, TensorEntry

__all__ = [
    "LOWERED_FILE",
    "LOWERED_SCHEMA_VERSION",
    "GraphName",
    "InitializerEntry",
    "Layout",
    "LoweredDescription",
    "PartEntry",
]

LOWERED_FILE = "lowered.json"
LOWERED_SCHEMA_VERSION = 1

GraphName = Literal["prefill", "decode", "top_logits"]

Layout = Literal["plain", "matmul_nbits", "matmul_nbits_scales"]
"""How the stored tensors become the graph's:

- "plain": as they are;
- "matmul_nbits": codes [K, N] become [N, K/block, block * bits / 8] unsigned, as MatMulNBits takes
  them: 8 or 128 is added, and two 4-bit codes share a byte, the first in the low half;
- "matmul_nbits_scales": scales [K/block, N] become [N, K/block].
"""


@dataclass(frozen=True, slots=True)
class PartEntry:
    """A tensor of the bundle's weights file."""

    name: str
    """The checkpoint's name of it, for messages."""
    dtype: Literal["float", "int4", "int8"]
    """Stored type, by ONNX's name."""
    shape: tuple[int, ...]
    """In elements, as stored."""
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class InitializerEntry:
    """An initialiser of the graphs that lies outside of them."""

    name: str
    """Its name in the graphs; both mean the same tensor by it."""
    dtype: Literal["float", "float16", "bfloat16", "int8", "uint8"]
    """Its type in the graphs."""
    shape: tuple[int, ...]
    """Its shape in the graphs."""
    layout: Layout
    parts: tuple[PartEntry, ...]
    """What it is made of: joined along ``axis``, then laid out, then cast to ``dtype``."""
    axis: int = 0
    """Of the stored tensors."""
    block_size: int | None = None
    """Inputs that share a scale; None but for codes."""


@dataclass(frozen=True, slots=True)
class LoweredDescription:
    """A lowered.json."""

    producer: str
    created: str
    """UTC, ISO 8601."""
    target: Literal["cpu", "cuda"]
    compute_dtype: Literal["fp32", "fp16", "bf16"]
    """Type of activations and caches; logits are float32."""
    attention: Literal["group_query", "mask"]
    """What attention is: "group_query", a fused operator that takes several rows of more than one
    token only where all begin at 0 and are equally long; "mask", the standard one, that takes any."""
    weights_sha256: str
    """Of the weights file it was made for."""
    options: tuple[str, ...]
    """Command-line options that make it again."""
    minimum_engine_versions: dict[str, str]
    graphs: dict[GraphName, GraphEntry]
    initializers: tuple[InitializerEntry, ...]
    """Every initialiser of either graph that lies outside of it."""
    files: dict[str, FileEntry]
    """The graphs' files."""
    schema_version: int = LOWERED_SCHEMA_VERSION

    def to_json(self) -> str:
        """The document, validated.

        Raises:
            BundleError: If a field breaks the schema.
        """
        raw = json.loads(json.dumps(asdict(self)))
        _validate(raw, None)
        return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> LoweredDescription:
        """Read and validate ``folder/lowered.json``.

        Raises:
            BundleError: If it is missing, is no JSON, is newer than this runtime, or breaks the
                schema.
        """
        path = folder / LOWERED_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} must be readable JSON: {error}", path=path) from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > LOWERED_SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version must be at most {LOWERED_SCHEMA_VERSION}, got {version}; "
                "install a newer qwen-export or lower the bundle with this one",
                path=path,
            )
        _validate(raw, path)
        return cls._from_raw(raw)

    @classmethod
    def _from_raw(cls, raw: Mapping[str, Any]) -> LoweredDescription:
        data = dict(raw)
        data["options"] = tuple(raw["options"])
        data["graphs"] = {phase: _graph(entry) for phase, entry in raw["graphs"].items()}
        data["initializers"] = tuple(_initializer(entry) for entry in raw["initializers"])
        data["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return cls(**data)


def _graph(raw: Mapping[str, Any]) -> GraphEntry:
    def tensors(entries: list[dict[str, Any]]) -> tuple[TensorEntry, ...]:
        return tuple(TensorEntry(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)

    return GraphEntry(raw["file"], tensors(raw["inputs"]), tensors(raw["outputs"]))


def _initializer(raw: Mapping[str, Any]) -> InitializerEntry:
    parts = tuple(PartEntry(**{**part, "shape": tuple(part["shape"])}) for part in raw["parts"])
    return InitializerEntry(**{**raw, "shape": tuple(raw["shape"]), "parts": parts})


@cache
def _validator() -> Any:
    import jsonschema  # a fifth of a second that --help need not pay

    schema = resources.files("qwen_runtime").joinpath("lowered.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(schema))


def _validate(raw: object, path: Path | None) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(_validator().iter_errors(raw))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        raise BundleError(
            f"{path or LOWERED_FILE}: {where}: {error.message}; the file is damaged or was edited: "
            "lower the bundle again with --overwrite",
            path=path,
        )
