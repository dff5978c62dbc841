"""Whether a model's numbers fit into float16.

float16 ends at 65,504. The residual stream of an engine in fp16 stays float32, but what a linear
layer makes of it does not. So the portable fp32 graph answers the calibration prompts, the ones a
bundle is proved with, and reports the largest magnitude of every value that would be float16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_export.errors import TargetError
from qwen_export.passes.retype import residual_nodes
from qwen_export.progress import Progress, no_progress
from qwen_runtime.backends.base import IntArray
from qwen_runtime.backends.versions import import_onnxruntime
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import RangeEntry

__all__ = ["HEADROOM", "LARGEST_FLOAT16", "check_float16_range"]

LARGEST_FLOAT16 = 65504.0
HEADROOM = 2.0
"""Prompts are samples: another one may go further than they did, by less than this factor."""
# What makes larger numbers of its operands. The other operators move them, or mix them with
# weights that sum to one.
_GROWING = ("Add", "Gemm", "MatMul", "Mul", "RMSNormalization")


def check_float16_range(bundle: Bundle, *, progress: Progress = no_progress) -> RangeEntry:
    """Answer the calibration prompts in float32 and look for numbers beyond float16.

    Args:
        bundle: A bundle with fp32 compute.
        progress: Where to report prompts.

    Returns:
        The largest magnitude found, and where.

    Raises:
        TargetError: If it exceeds half of float16's largest number, or is not finite. It names
            the layer.
    """
    # Reaching the prompts imports what verifies bundles.
    from qwen_export.parity.prompts import make_prompts

    rows = [prompt.tokens for prompt in make_prompts(bundle).prompts]
    model = ir.load(bundle.file(bundle.manifest.graphs["prefill"].file))
    nodes = _report_ranges(model)
    session = _session(bundle, model)
    largest = np.zeros(len(nodes))
    with progress("Checking float16's range", len(rows)) as advance:
        for row in rows:
            outputs = session.run([_output_name(name) for name in nodes], _feeds(bundle, row))
            largest = np.maximum(largest, np.array(outputs, np.float64).reshape(-1))
            advance(1)
    # argmax takes a NaN for the largest.
    worst = int(np.argmax(largest))
    value, node = float(largest[worst]), nodes[worst]
    if not value <= LARGEST_FLOAT16 / HEADROOM:
        raise TargetError(
            f"--compute-dtype fp16 needs values within ±{LARGEST_FLOAT16 / HEADROOM:,.0f}, half "
            f"of float16's range, but {node} reaches {value:,.0f} on the calibration prompts; "
            "build with --compute-dtype bf16, whose range is float32's",
            names=[nodes[index] for index in np.argsort(-largest) if not _fits(largest[index])],
        )
    return RangeEntry(value, node, sum(map(len, rows)))


def _fits(value: float) -> bool:
    return math.isfinite(value) and value <= LARGEST_FLOAT16 / HEADROOM


def _report_ranges(model: ir.Model) -> list[str]:
    """Make a graph's outputs the largest magnitude of every value that float16 would hold.

    Returns:
        The nodes that produce them, in the graph's order.
    """
    graph = model.graph
    exact = {node for node in residual_nodes(graph) if node.op_type == "Add"}
    watched = [
        node
        for node in graph
        if node.op_type in _GROWING
        and node not in exact
        and node.outputs[0].dtype == ir.DataType.FLOAT
    ]
    outputs = [_largest_magnitude(graph, node) for node in watched]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    return [str(node.name) for node in watched]


def _largest_magnitude(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Add value ── Abs ── ReduceMax ── scalar after a node."""
    (value,) = node.outputs
    magnitude = ir.node("Abs", [value], name=f"{node.name}/Abs")
    result = ir.node(
        "ReduceMax",
        magnitude.outputs,
        attributes={"keepdims": 0},
        name=f"{node.name}/ReduceMax",
    )
    graph.insert_after(node, [magnitude, result])
    (found,) = result.outputs
    found.name = _output_name(str(node.name))
    found.dtype, found.shape = ir.DataType.FLOAT, ir.Shape([])
    return found


def _output_name(node: str) -> str:
    return f"range:{node}"


def _session(bundle: Bundle, model: ir.Model) -> Any:
    ort = import_onnxruntime(None)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path.resolve())
    )
    if bundle.manifest.quantization is None:
        # Weights are read once for each prompt; packing would hold a second copy of them.
        options.add_session_config_entry("session.disable_prepacking", "1")
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _feeds(bundle: Bundle, row: IntArray) -> dict[str, Any]:
    """One row over empty caches that are as long as it is."""
    model = bundle.manifest.model
    shape = (1, model.num_key_value_heads, len(row), model.head_dim)
    caches = {
        entry.name: np.zeros(shape, np.float32)
        for entry in bundle.manifest.graphs["prefill"].inputs
        if entry.name.startswith("past_key_values.")
    }
    return {
        "input_ids": row[None],
        "past_lengths": np.zeros(1, np.int64),
        "logits_indices": np.arange(len(row))[None],
        **caches,
    }
