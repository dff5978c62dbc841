"""The embedding and the output projection.

A quantised embedding is looked up as codes, whose rows are then scaled. Where the same table is
the output projection too, it is one initializer in the arrangement of MatMulNBits, [V, E/block,
block * bits / 8] unsigned::

    codes -- Gather - [two codes of a byte] - Cast - Sub(zero) -+
    scales - Gather - Unsqueeze --------------------------------+- Mul - Reshape

A table of floats that is the output projection too is multiplied as it is stored. In the graph of
prompts FusedMatMul does that: flattening around the portable Gemm takes a ``Shape`` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.errors import TargetError
from qwen_export.lowering.nodes import (
    CONTRIB,
    add_before,
    constant,
    graph_input,
    integers,
    producer,
    replace_node,
    size_of,
)
from qwen_export.weights import scale_name

__all__ = ["add_next_tokens", "lower_embedding", "lower_tied_head"]

NEXT_TOKENS = "next_tokens"
_LOGITS = "logits"


def lower_embedding(model: ir.Model) -> None:
    """Look up a quantised embedding without DequantizeLinear; one of floats stays as it is.

    Args:
        model: A bundle's graph whose linear layers are lowered; changed in place.

    Raises:
        TargetError: If there is no lookup of such codes.
    """
    graph = model.graph
    codes = graph.initializers.get(EMBEDDING_NAME)
    scales = graph.initializers.get(scale_name(EMBEDDING_NAME))
    if codes is None or scales is None:
        return
    # Codes may take several nodes to be looked up; their scales take one.
    (lookup,) = (use.node for use in scales.uses())
    (last,) = (use.node for use in lookup.outputs[0].uses())
    # Columns are looked up where the table is stored the way the output projection wants it.
    tied = lookup.attributes.get_int("axis", 0) == 1
    if tied:
        (last,) = (use.node for use in last.outputs[0].uses())
        codes = graph.initializers[LM_HEAD_NAME]
        scales = graph.initializers[scale_name(LM_HEAD_NAME)]
    elif codes.dtype != ir.DataType.INT8:
        raise TargetError(
            f"{EMBEDDING_NAME} must be int8 or floats where it is not the output projection too, "
            f"got {codes.dtype}",
            names=[EMBEDDING_NAME],
        )
    replace_node(last, _lookup(graph, last, codes, scales))


def lower_tied_head(model: ir.Model) -> None:
    """Multiply by a tied table of floats without flattening; other heads stay as they are.

    Args:
        model: A bundle's graph, retyped or not; changed in place.
    """
    graph = model.graph
    for gemm in [each for each in graph if each.op_type == "Gemm"]:
        x = producer(gemm.inputs[0], "Reshape").inputs[0]
        (last,) = (use.node for use in gemm.outputs[0].uses())
        if last.inputs[1] is not None and last.inputs[1].is_initializer():
            continue  # one position a row: the shape is known, and no Shape is in the way
        (output,) = last.outputs
        if x is None or output.dtype is None or output.shape is None:
            raise AssertionError(f"{gemm.name} must be the output projection")
        product = add_before(
            last,
            f"{str(gemm.name).rpartition('/')[0]}/FusedMatMul",
            [x, gemm.inputs[1]],
            {"transB": 1},
            dtype=output.dtype,
            shape=output.shape,
            domain=CONTRIB,
        )
        replace_node(last, product)


def add_next_tokens(model: ir.Model) -> None:
    """Give a decode graph the output ``next_tokens``, [B] int64: what greedy decoding takes.

    Of equal logits the lowest token wins, as in NumPy, which ArgMax does not promise on CUDA: the
    largest negated token among those whose logit is the largest. A row with a NaN, which is equal
    to nothing, gives the size of the vocabulary.

    Args:
        model: A decode graph with logits [B, 1, V] float32; changed in place.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == _LOGITS)
    batch = graph_input(graph, "past_lengths").shape
    if logits.shape is None or batch is None or not isinstance(logits.shape[2], int):
        raise AssertionError("logits must have a shape whose vocabulary is known")
    vocab_size = logits.shape[2]
    tokens = constant(
        graph, -np.arange(vocab_size, dtype=np.float32), f"negated.tokens[{vocab_size}]"
    )
    none = constant(graph, np.array(-vocab_size, np.float32), f"constant.float32({-vocab_size})")
    stem, last = "/next_tokens", integers(graph, -1)
    float32, one = ir.DataType.FLOAT, [*batch, 1, 1]

    def add(
        name: str,
        inputs: list[ir.Value],
        shape: list[int | ir.SymbolicDim],
        dtype: ir.DataType,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        op_type = name.partition("_")[0]
        node = ir.node(op_type, inputs, attributes or {}, name=f"{stem}/{name}")
        (output,) = node.outputs
        output.name, output.dtype, output.shape = f"{stem}/{name}_output_0", dtype, ir.Shape(shape)
        graph.append(node)
        return output

    largest = add("ReduceMax", [logits, last], one, float32, {"keepdims": 1})
    hit = add("Equal", [logits, largest], list(logits.shape), ir.DataType.BOOL)
    negated = add("Where", [hit, tokens, none], list(logits.shape), float32)
    first = add("ReduceMax_1", [negated, last], one, float32, {"keepdims": 1})
    flat = add("Reshape", [first, last], list(batch), float32)
    token = add("Neg", [flat], list(batch), float32)
    result = add("Cast", [token], list(batch), ir.DataType.INT64, {"to": ir.DataType.INT64})
    result.name = NEXT_TOKENS
    graph.outputs.insert(1, result)


def _lookup(graph: ir.Graph, before: ir.Node, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """Rows of a quantised table [B, S, E]; unsigned codes are those of MatMulNBits."""
    ids = graph_input(graph, "input_ids")
    (output,), stem, dtype = before.outputs, "/model/embed_tokens", scales.dtype
    if dtype is None or output.shape is None or scales.shape is None or codes.shape is None:
        raise AssertionError("the embedding must be typed")
    batch, sequence, _ = output.shape
    width, blocks = size_of(output, 2), size_of(scales, 1)
    size = width // blocks
    blocked = [batch, sequence, blocks, size]

    def step(
        name: str,
        inputs: list[ir.Value],
        kind: ir.DataType,
        shape: Sequence[int | ir.SymbolicDim],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        full = f"{stem}/{name}"
        return add_before(before, full, inputs, attributes, dtype=kind, shape=shape)

    stored = codes.shape.numpy()
    row = [batch, sequence, *stored[1:]]
    values = step("Gather_codes", [codes, ids], codes.dtype or ir.DataType.UINT8, row)
    if stored[1:] == (blocks, size // 2):
        values = step("Cast_bytes", [values], ir.DataType.INT32, row, {"to": ir.DataType.INT32})
        sixteen = _typed(graph, 16, ir.DataType.INT32)
        high = step("Div", [values, sixteen], ir.DataType.INT32, row)
        shifted = step("Mul_high", [high, sixteen], ir.DataType.INT32, row)
        low = step("Sub_low", [values, shifted], ir.DataType.INT32, row)
        # The first of two codes is in the low half of a byte.
        pair = [
            step(f"Unsqueeze_{name}", [half, integers(graph, 4)], ir.DataType.INT32, [*row, 1])
            for name, half in (("low", low), ("high", high))
        ]
        values = step("Concat", pair, ir.DataType.INT32, [*row, 2], {"axis": 4})
    values = step("Cast", [values], dtype, list(values.shape or ()), {"to": dtype})
    if stored[1:] != (blocks, size):
        values = step("Reshape", [values, integers(graph, 0, 0, blocks, size)], dtype, blocked)
    if codes.dtype == ir.DataType.UINT8:
        zero = 2 ** (8 * stored[2] // size - 1)
        values = step("Sub", [values, _typed(graph, zero, dtype)], dtype, blocked)
    factors = step("Gather_scales", [scales, ids], dtype, blocked[:3])
    column = step("Unsqueeze", [factors, integers(graph, 3)], dtype, [*blocked[:3], 1])
    product = step("Mul", [values, column], dtype, blocked)
    flat = integers(graph, 0, 0, width)
    return step("Reshape_1", [product, flat], dtype, [batch, sequence, width])


def _typed(graph: ir.Graph, value: int, dtype: ir.DataType) -> ir.Value:
    """The constant scalar of a type."""
    name = f"constant.{dtype.name.lower()}({value})"
    return constant(graph, np.array(value, dtype.numpy()), name)
