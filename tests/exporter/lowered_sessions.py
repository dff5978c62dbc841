"""A bundle's lowered graphs and its portable ones side by side on ONNX Runtime's CPU provider.

Initializers are read here from the published layouts, independently of the runtime's own reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_description import InitializerEntry
from qwen_runtime.lowered_file import LoweredFolder

__all__ = [
    "CAPACITY",
    "NEVER_WRITTEN",
    "CallResult",
    "Lowered",
    "Portable",
    "operators",
    "read_initializer",
]

CAPACITY = 40
NEVER_WRITTEN = 7.0
"""Fills caches, so that a slot which must not be read or written shows."""
_DTYPES = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}
_CACHE_DTYPES = {"fp32": np.float32, "fp16": np.float16}

CallResult = dict[str, np.ndarray]


def read_initializer(bundle: Bundle, entry: InitializerEntry) -> np.ndarray:
    """An initializer as the graph has it."""
    data = np.fromfile(bundle.file(bundle.manifest.weights.file), np.uint8)
    parts = []
    for part in entry.parts:
        raw = data[part.offset : part.offset + part.num_bytes]
        if part.dtype == "int4":
            codes = np.stack([(raw << 4).view(np.int8) >> 4, raw.view(np.int8) >> 4], -1)
            parts.append(codes.reshape(-1)[: int(np.prod(part.shape))].reshape(part.shape))
        else:
            parts.append(raw.view(_DTYPES[part.dtype]).reshape(part.shape))
    whole = np.concatenate(parts, axis=entry.axis)
    if entry.layout == "plain":
        return np.ascontiguousarray(whole.astype(_DTYPES[entry.dtype]))
    if entry.layout == "matmul_nbits_scales":
        return np.ascontiguousarray(whole.T.astype(_DTYPES[entry.dtype]))
    bits = 4 if entry.parts[0].dtype == "int4" else 8
    unsigned = (whole.T.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    blocks = unsigned.reshape(len(unsigned), -1, entry.block_size or 1)
    if bits == 4:
        blocks = blocks[..., 0::2] | (blocks[..., 1::2] << 4)
    return np.ascontiguousarray(blocks)


class Portable:
    """The bundle's own graphs, quantised weights multiplied in fp32."""

    def __init__(self, bundle: Bundle) -> None:
        options = _options()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.sessions = {
            phase: ort.InferenceSession(
                str(bundle.file(f"{phase}.onnx")), options, ["CPUExecutionProvider"]
            )
            for phase in ("prefill", "decode")
        }
        self.caches = _caches(bundle, np.float32)

    def run(
        self, phase: str, ids: np.ndarray, past: np.ndarray, rows: slice = slice(None)
    ) -> CallResult:
        """Run new tokens [B, S] over some rows of the caches, in place; all logits."""
        return _run(self.sessions[phase], ids, past, {k: v[rows] for k, v in self.caches.items()})


class Lowered(Portable):
    """Its lowered graphs; some initializers may be given instead of read."""

    def __init__(
        self, bundle: Bundle, folder: LoweredFolder, given: dict[str, np.ndarray] | None = None
    ) -> None:
        compute_dtype = folder.description.compute_dtype
        arrays = {
            entry.name: read_initializer(bundle, entry)
            for entry in folder.description.initializers
        } | (given or {})
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
        }
        self.sessions = {}
        for phase in ("prefill", "decode"):
            options = _options()
            if compute_dtype != "fp32":
                # This provider casts 16-bit initializers and would fold the casts before it is
                # given what they are.
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(bundle.path.resolve()))
            path = folder.path / folder.description.graphs[phase].file
            for name in ir.load(path).graph.initializers:
                if name in self.values:
                    options.add_initializer(name, self.values[name])
            self.sessions[phase] = ort.InferenceSession(
                str(path), options, ["CPUExecutionProvider"]
            )
        self.caches = _caches(bundle, _CACHE_DTYPES[compute_dtype])


def operators(path: Path) -> dict[str, int]:
    """How often a graph has each operator."""
    counts: dict[str, int] = {}
    for node in ir.load(path).graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _options() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def _caches(bundle: Bundle, dtype: Any) -> dict[str, np.ndarray]:
    model = bundle.manifest.model
    shape = (2, model.num_key_value_heads, CAPACITY, model.head_dim)
    return {
        f"{i}.{part}": np.full(shape, NEVER_WRITTEN, dtype)
        for i in range(model.num_hidden_layers)
        for part in ("key", "value")
    }


def _run(
    session: Any, ids: np.ndarray, past: np.ndarray, caches: dict[str, np.ndarray]
) -> CallResult:
    names = [entry.name for entry in session.get_inputs()]
    feeds = {"input_ids": ids, "past_lengths": past}
    if "logits_indices" in names:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        feeds["logits_indices"] = np.ascontiguousarray(positions)
    if "total_sequence_length" in names:
        decode = ids.shape[1] == 1
        total = CAPACITY if decode else int(past.max()) + ids.shape[1]
        feeds["total_sequence_length"] = np.array([total], np.int32)
    io = session.io_binding()
    for name, array in feeds.items():
        io.bind_cpu_input(name, array)
    for name, array in caches.items():
        place = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
        io.bind_input(f"past_key_values.{name}", *place)
        io.bind_output(f"present.{name}", *place)
    wanted = [
        entry.name for entry in session.get_outputs() if not entry.name.startswith("present.")
    ]
    for name in wanted:
        io.bind_output(name, "cpu")
    session.run_with_iobinding(io)
    results = io.get_outputs()[len(caches) :]
    return {name: value.numpy() for name, value in zip(wanted, results, strict=True)}
