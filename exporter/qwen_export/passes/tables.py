"""Quantised embeddings for engines that want a whole table under DequantizeLinear.

The portable graph dequantises the rows it looks up. TensorRT has no Gather of codes, and keeps a
table packed where it is dequantised first. A table that is the output projection too then is one
constant with two readers::

    codes -- lookup --+                                                      +- Gather - Transpose
    scales - Gather --+ DequantizeLinear - Transpose  =>  DequantizeLinear --+
    codes, scales --- DequantizeLinear - MatMul                              +- MatMul

The lookup is a Gather, or where two codes share a byte the operators that take them apart. Such a
table stays two constants over the same bytes: TensorRT keeps codes of 4 bits in another order for a
MatMul, and would store a shared constant twice as well.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.weights import codes_of_bytes, scale_name

__all__ = ["dequantize_tables"]


def dequantize_tables(model: ir.Model) -> None:
    """Let the embedding look up rows of a dequantised table.

    Args:
        model: A bundle's graph with its shapes; changed in place. One whose embedding is not
            quantised stays as it is.
    """
    graph = model.graph
    codes = graph.initializers.get(EMBEDDING_NAME)
    scales = graph.initializers.get(scale_name(EMBEDDING_NAME))
    if codes is None or scales is None:
        return
    # Whatever becomes of codes, their scales are looked up by one Gather.
    (lookup,) = (use.node for use in scales.uses())
    (rows,) = (use.node for use in lookup.outputs[0].uses())
    packed = codes.dtype == ir.DataType.UINT8
    if packed and isinstance(codes.const_value, ir.ExternalTensor):
        stored = codes_of_bytes(codes.const_value)
        codes.const_value, codes.dtype, codes.shape = stored, stored.dtype, stored.shape
    vocab_axis = lookup.attributes.get_int("axis", 0)
    block_size = rows.attributes.get_int("block_size", 0)
    table = ir.node(
        "DequantizeLinear",
        [codes, scales],
        {"axis": 1 - vocab_axis, "block_size": block_size},
        name=rows.name,
    )
    states = ir.node(
        "Gather", [table.outputs[0], lookup.inputs[1]], {"axis": vocab_axis}, name=lookup.name
    )
    for node, like in ((table, codes), (states, rows.outputs[0])):
        output = node.outputs[0]
        output.name = f"{node.name}_output_0"
        output.dtype, output.shape = ir.DataType.FLOAT, like.shape
    graph.insert_before(lookup, [table, states])
    rows.outputs[0].replace_all_uses_with(states.outputs[0])
    head = graph.initializers.get(LM_HEAD_NAME)
    if vocab_axis == 1 and head is not None and not packed:
        # Stored the way the output projection wants it: it is this table, under another name.
        (dequantized,) = (use.node for use in head.uses())
        dequantized.outputs[0].replace_all_uses_with(table.outputs[0])
    common.RemoveUnusedNodesPass()(model)
