"""Whether a lowered graph is what its provider runs from end to end, looked at node by node.

One node without a CUDA kernel makes every call wait for the CPU and forbids CUDA graphs, and an
attention with a cache that is not the layer's own answers wrongly. So nothing is taken on trust.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from qwen_export.errors import TargetError
from qwen_export.lowering.nodes import CONTRIB
from qwen_export.lowering.options import LoweringOptions, Target

__all__ = ["inspect_lowered"]

_KERNELS = {
    "": frozenset(
        (
            "Add",
            "And",
            "Attention",
            "Cast",
            "Concat",
            "CumSum",
            "Div",
            "Equal",
            "Gather",
            "GatherND",
            "Gemm",
            "Greater",
            "LessOrEqual",
            "MatMul",
            "Mul",
            "Neg",
            "ReduceMax",
            "Reshape",
            "RotaryEmbedding",
            "SimplifiedLayerNormalization",
            "Slice",
            "Sub",
            "TensorScatter",
            "Transpose",
            "Unsqueeze",
            "Where",
        )
    ),
    CONTRIB: frozenset(
        (
            "FusedMatMul",
            "GroupQueryAttention",
            "MatMulNBits",
            "QuickGelu",
            "SkipSimplifiedLayerNormalization",
        )
    ),
}
"""Operators whose CUDA kernels take what the graphs give them, by domain, from the provider's list
of kernels. ``Shape``, ``Range`` and ``Split`` are left out on purpose: their results or arguments
are on the CPU."""
_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def inspect_lowered(
    graph: ir.Graph, options: LoweringOptions, target: Target, *, num_hidden_layers: int
) -> None:
    """Look at every node and every cache.

    Args:
        graph: A lowered graph.
        options: What it was lowered to.
        target: For which provider.
        num_hidden_layers: Attention layers that it must have.

    Raises:
        TargetError: Naming the nodes or inputs at fault.
    """
    strangers = [node for node in graph if node.op_type not in _KERNELS.get(node.domain, ())]
    if strangers:
        raise TargetError(
            f"every node of a graph for {target} must be one that is known to run there, but "
            f"{strangers[0].name} is {strangers[0].domain or 'ai.onnx'}::{strangers[0].op_type}",
            names=[str(node.name) for node in strangers],
        )
    folded = [
        node
        for node in graph
        if all(value is None or value.is_initializer() for value in node.inputs)
    ]
    if folded:
        # It would be computed while the graph is loaded, from weights that are not there yet.
        raise TargetError(
            f"{folded[0].name} must read something beside weights", names=[str(folded[0].name)]
        )
    unused = [str(value.name) for value in graph.inputs if not value.uses()]
    if unused:
        raise TargetError(f"every input must be used, but {unused[0]} is not", names=unused)
    _inspect_attention(graph, options, num_hidden_layers)
    _inspect_caches(graph)


def _inspect_attention(graph: ir.Graph, options: LoweringOptions, num_layers: int) -> None:
    fused = options.form == "group_query"
    wanted = "GroupQueryAttention" if fused else "Attention"
    found = [node for node in graph if node.op_type == wanted]
    if len(found) != num_layers:
        raise TargetError(
            f"a graph of {num_layers} layers must have as many {wanted}, found {len(found)}"
        )
    if not fused:
        bare = [node for node in found if len(node.inputs) < 4 or node.inputs[3] is None]
        if bare:
            raise TargetError(
                f"every attention must have its mask, but {bare[0].name} has none",
                names=[str(node.name) for node in bare],
            )
        return
    for index, node in enumerate(found):
        caches = [value.name if value is not None else None for value in node.inputs[3:5]]
        results = [value.name for value in node.outputs[1:3]]
        if caches != [f"past_key_values.{index}.{part}" for part in ("key", "value")] or (
            results != [f"present.{index}.{part}" for part in ("key", "value")]
        ):
            raise TargetError(
                f"{node.name} must read and write the caches of layer {index}, but reads "
                f"{caches} and writes {results}",
                names=[str(node.name)],
            )
    lengths = {(node.inputs[5], node.inputs[6]) for node in found}
    if len(lengths) != 1:
        raise TargetError(
            "every attention must be given the same lengths",
            names=[str(node.name) for node in found],
        )


def _inspect_caches(graph: ir.Graph) -> None:
    outputs = {value.name: value for value in graph.outputs}
    for value in graph.inputs:
        match = _CACHE.fullmatch(str(value.name))
        if match is None:
            continue
        present = outputs.get(f"present.{match[1]}.{match[2]}")
        if present is None or (present.dtype, present.shape) != (value.dtype, value.shape):
            raise TargetError(
                f"{value.name} must come back as present.{match[1]}.{match[2]} of the same type "
                "and shape",
                names=[str(value.name)],
            )
