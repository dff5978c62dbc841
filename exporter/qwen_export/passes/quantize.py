"""Quantised weights in a traced graph: standard DequantizeLinear in front of what reads them.

A linear layer::

    codes [K, N] --+
    scales --------+ DequantizeLinear - MatMul

The embedding, where the table [E, V] is also the output projection, and where it is not, [V, E].
Only the rows asked for are dequantised::

    codes -- Gather(1) --+                                 codes -- Gather(0) --+
    scales - Gather(1) --+ DequantizeLinear - Transpose    scales - Gather(0) --+ DequantizeLinear

A tied output projection becomes a linear layer over the same bytes of the weights file, under
initializers of its own: one initializer with two kinds of readers keeps ONNX Runtime from fusing
DequantizeLinear and MatMul.

There is no Gather of INT4. A tied table of 4 bits is looked up as its bytes, two tokens in each::

    bytes [E, V / 2] - Gather(1) at ids / 2 - BitShift by 4 * (ids mod 2) - signed code
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.passes.constants import constant
from qwen_export.weights import BlockFormat, StoredTensor, scale_name

__all__ = ["TIED_ALIASES", "quantize"]

TIED_ALIASES = {
    LM_HEAD_NAME: EMBEDDING_NAME,
    scale_name(LM_HEAD_NAME): scale_name(EMBEDDING_NAME),
}
"""Initializers of a tied output projection, and the tensors whose bytes they name."""


def quantize(model: ir.Model, tensors: Mapping[str, StoredTensor]) -> None:
    """Make a float graph read quantised weights.

    Args:
        model: A traced graph; changed in place. Its weights need not be bound.
        tensors: What the weights file holds, by name. Those with a format are quantised.
    """
    graph = model.graph
    for name, weight in list(graph.initializers.items()):
        stored = tensors.get(name)
        if stored is None or stored.format is None:
            continue
        nodes = [use.node for use in weight.uses()]
        del graph.initializers[name]
        for node in nodes:
            _READERS[node.op_type](graph, node, stored, stored.format)
    common.RemoveUnusedNodesPass()(model)


def _linear(graph: ir.Graph, node: ir.Node, stored: StoredTensor, form: BlockFormat) -> None:
    codes, scales = _initializers(graph, stored.name, stored, form)
    node.replace_input_with(1, _dequantize(graph, node, codes, scales, form.axis, form))


def _embedding(graph: ir.Graph, node: ir.Node, stored: StoredTensor, form: BlockFormat) -> None:
    ids, output = node.inputs[1], node.outputs[0]
    if ids is None or ids.shape is None:
        raise AssertionError(f"{node.name}: the shape of the ids must be known")
    codes, scales = _initializers(graph, stored.name, stored, form)
    vocab_axis = {"axis": 1 - form.axis}
    if form.bits == 4:
        some_codes = _look_up_packed(graph, node, codes, ids)
    else:
        some_codes = _insert(graph, node, "Gather", [codes, ids], vocab_axis)
    some_scales = _insert(graph, node, "Gather_1", [scales, ids], vocab_axis)
    # The axes of the ids take the place of the vocabulary's.
    num_ids = len(ids.shape)
    axis = 0 if form.axis == 0 else num_ids
    states = _dequantize(graph, node, some_codes, some_scales, axis, form)
    if axis == 0:
        states = _insert(graph, node, "Transpose", [states], {"perm": [*range(1, num_ids + 1), 0]})
    output.replace_all_uses_with(states)
    graph.remove(node, safe=True)


def _look_up_packed(graph: ir.Graph, node: ir.Node, codes: ir.Value, ids: ir.Value) -> ir.Value:
    """Columns [E, ...] of a table [E, V] of 4 bits, as bytes."""
    inputs, tokens = codes.shape.numpy() if codes.shape is not None else (0, 1)
    if tokens % 2:
        raise AssertionError(f"{codes.name}: {tokens} tokens do not share bytes two by two")
    codes.dtype, codes.shape = ir.DataType.UINT8, ir.Shape([inputs, tokens // 2])

    def step(name: str, value: ir.Value, number: int, dtype: npt.DTypeLike) -> ir.Value:
        operand = constant(graph, np.array(number, dtype))
        return _insert(graph, node, name, [value, operand], {})

    pair = step("Div", ids, 2, np.int64)
    bits = step("Mul", step("Mod", ids, 2, np.int64), 4, np.int64)
    shift = _insert(graph, node, "Cast", [bits], {"to": ir.DataType.UINT8})
    two = _insert(graph, node, "Gather", [codes, pair], {"axis": 1})
    one = _insert(graph, node, "BitShift", [two, shift], {"direction": "RIGHT"})
    # 0 to 7 and -8 to -1 are 8 to 15 and 0 to 7 with the sign's bit turned over.
    raised = step("BitwiseXor", step("BitwiseAnd", one, 15, np.uint8), 8, np.uint8)
    whole = _insert(graph, node, "Cast_1", [raised], {"to": ir.DataType.INT8})
    return step("Sub", whole, 8, np.int8)


def _tied_head(graph: ir.Graph, node: ir.Node, stored: StoredTensor, form: BlockFormat) -> None:
    """Reshape - Gemm(transB) - Reshape becomes MatMul."""
    codes, scales = _initializers(graph, LM_HEAD_NAME, stored, form)
    flatten = node.inputs[0].producer() if node.inputs[0] is not None else None
    (unflatten,) = (use.node for use in node.outputs[0].uses())
    if flatten is None or flatten.op_type != "Reshape" or unflatten.op_type != "Reshape":
        raise AssertionError(f"{node.name} must stand between two Reshapes")
    weight = _dequantize(graph, node, codes, scales, form.axis, form)
    logits = _insert(graph, node, "MatMul", [flatten.inputs[0], weight], {})
    old = unflatten.outputs[0]
    index = graph.outputs.index(old)
    logits.name, logits.type, logits.shape = old.name, old.type, old.shape
    graph.outputs[index] = logits


_READERS = {"MatMul": _linear, "Gather": _embedding, "Gemm": _tied_head}
"""How each operator that the decoder gives a weight takes a quantised one."""


def _initializers(
    graph: ir.Graph, name: str, stored: StoredTensor, form: BlockFormat
) -> tuple[ir.Value, ir.Value]:
    blocks = list(stored.shape)
    blocks[form.axis] //= form.block_size
    codes = ir.val(name, dtype=form.dtype, shape=ir.Shape(stored.shape))
    scales = ir.val(scale_name(name), dtype=ir.DataType.FLOAT, shape=ir.Shape(blocks))
    for value in (codes, scales):
        graph.initializers[str(value.name)] = value
    return codes, scales


def _dequantize(
    graph: ir.Graph,
    reader: ir.Node,
    codes: ir.Value,
    scales: ir.Value,
    axis: int,
    form: BlockFormat,
) -> ir.Value:
    attributes = {"axis": axis, "block_size": form.block_size}
    return _insert(graph, reader, "DequantizeLinear", [codes, scales], attributes)


def _insert(
    graph: ir.Graph,
    reader: ir.Node,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | str | list[int]],
) -> ir.Value:
    """Add a node before another one and in its module; "Gather_1" is a Gather."""
    full = f"{str(reader.name).rpartition('/')[0]}/{name}"
    node = ir.node(name.partition("_")[0], inputs, attributes=attributes, name=full)
    node.outputs[0].name = f"{full}_output_0"
    graph.insert_before(reader, node)
    return node.outputs[0]
