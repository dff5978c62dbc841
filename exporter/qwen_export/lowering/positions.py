"""Positions and masks that are made on the device.

The portable graph counts with ``Range`` over a ``Shape``. Both are computed on the CPU, whose
results a GPU would wait for and a CUDA graph cannot record. A running sum of ones counts as well::

    input_ids [B, S] - Mul(0) - Add(1) - CumSum - 0, 1, ... S - 1
    a cache   [B, K, C, D] - Slice - Cast - Mul(0) - Add(1) - CumSum - 0, 1, ... C - 1
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.lowering.nodes import (
    add_before,
    graph_input,
    integer,
    integers,
    producer,
    replace_node,
)

__all__ = ["count_on_device", "last_positions", "positions_of"]

_INT64 = ir.DataType.INT64


def count_on_device(model: ir.Model) -> None:
    """Replace every ``Range`` over an axis of an input by a running sum.

    Args:
        model: A bundle's graph; changed in place. Nodes that nothing reads any longer stay.
    """
    graph = model.graph
    ids = graph_input(graph, "input_ids")
    for node in [each for each in graph if each.op_type == "Range"]:
        source = producer(producer(node.inputs[1], "Squeeze").inputs[0], "Shape").inputs[0]
        prefix = str(node.name)
        if source is ids:
            axes = list(ids.shape or ())
            counted = _count(graph, node, f"{prefix}/ids", ids, 1, axes)
            # Rows count alike: [B, S] stands where [S] was added to a column of lengths.
            replace_node(node, counted)
        elif source is not None:
            replace_node(node, _count_slots(graph, node, source))


def last_positions(graph: ir.Graph, before: ir.Node) -> ir.Value:
    """Position of each row's last new token, [B] int64: past_lengths + S - 1."""
    past = graph_input(graph, "past_lengths")
    ids = graph_input(graph, "input_ids")
    batch, sequence = list(ids.shape or ())
    if sequence == 1:
        return past
    counted = _count(graph, before, "/model/last", ids, 1, [batch, sequence])
    index = integers(graph, -1)
    last = add_before(
        before,
        "/model/last/Gather",
        [counted, index],
        {"axis": 1},
        dtype=_INT64,
        shape=[batch, 1],
    )
    last = add_before(
        before,
        "/model/last/Reshape",
        [last, index],
        dtype=_INT64,
        shape=[batch],
    )
    return add_before(before, "/model/last/Add_past", [past, last], dtype=_INT64, shape=[batch])


def positions_of(rotary: ir.Node) -> ir.Value:
    """The position of every new token, [B, S], as a RotaryEmbedding reads it."""
    positions = rotary.inputs[3]
    if positions is None:
        raise AssertionError(f"{rotary.name} must be given positions")
    return positions


def _count(
    graph: ir.Graph,
    before: ir.Node,
    prefix: str,
    value: ir.Value,
    axis: int,
    shape: list[int | ir.SymbolicDim],
) -> ir.Value:
    """0, 1, ... along an axis of an int64 value, in its shape."""
    zeros = add_before(
        before, f"{prefix}/Mul", [value, integers(graph, 0)], dtype=_INT64, shape=shape
    )
    ones = add_before(
        before, f"{prefix}/Add", [zeros, integers(graph, 1)], dtype=_INT64, shape=shape
    )
    return add_before(
        before,
        f"{prefix}/CumSum",
        [ones, integer(graph, axis)],
        {"exclusive": 1},
        dtype=_INT64,
        shape=shape,
    )


def _count_slots(graph: ir.Graph, before: ir.Node, cache: ir.Value) -> ir.Value:
    """0, 1, ... C - 1 from a cache [B, K, C, D], whatever numbers are in it."""
    if cache.dtype is None or cache.shape is None:
        raise AssertionError(f"{cache.name} must have a type and a shape")
    capacity, prefix = cache.shape[2], str(before.name)
    row = add_before(
        before,
        f"{prefix}/Slice",
        [
            cache,
            integers(graph, 0, 0, 0),
            integers(graph, 1, 1, 1),
            integers(graph, 0, 1, 3),
        ],
        dtype=cache.dtype,
        shape=[1, 1, capacity, 1],
    )
    # Through bool, since a number that never was written may be none.
    known = add_before(
        before,
        f"{prefix}/Cast",
        [row],
        {"to": ir.DataType.BOOL},
        dtype=ir.DataType.BOOL,
        shape=[1, 1, capacity, 1],
    )
    bits = add_before(
        before,
        f"{prefix}/Cast_1",
        [known],
        {"to": _INT64},
        dtype=_INT64,
        shape=[1, 1, capacity, 1],
    )
    flat = add_before(
        before,
        f"{prefix}/Reshape",
        [bits, integers(graph, -1)],
        dtype=_INT64,
        shape=[capacity],
    )
    return _count(graph, before, prefix, flat, 0, [capacity])
