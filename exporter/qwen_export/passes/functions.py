"""The model-local function that every attention node calls.

    q, k, v, mask ── Attention ── y        kv_lengths: for engines that take lengths instead

An engine that must express attention differently swaps this one body, not every layer.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.model import ops

__all__ = ["define_cached_attention"]


def define_cached_attention(model: ir.Model) -> None:
    """Add ``qwen::CachedAttention`` with its standard body: Attention under a boolean mask."""
    q, k, v, mask, lengths = (
        ir.Value(name=name) for name in ("q", "k", "v", "mask", "kv_lengths")
    )
    node = ir.node("Attention", [q, k, v, mask], name="Attention")
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [q, k, v, mask, lengths],
        node.outputs,
        nodes=[node],
        opset_imports={"": ops.OPSET},
        name="CachedAttention",
    )
    function = ir.Function(ops.DOMAIN, "CachedAttention", graph=graph, attributes=[])
    model.functions[function.identifier()] = function
    model.opset_imports[ops.DOMAIN] = 1
