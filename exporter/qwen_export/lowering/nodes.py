"""Adding nodes to a typed graph, and walking back through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "CONTRIB",
    "add_before",
    "constant",
    "graph_input",
    "integer",
    "integers",
    "producer",
    "replace_node",
    "size_of",
]

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

Dims = Sequence[int | ir.SymbolicDim] | ir.Shape


def add_before(
    reader: ir.Node,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    dtype: ir.DataType,
    shape: Dims,
    domain: str = "",
) -> ir.Value:
    """Add a node of one output before another one.

    Args:
        reader: The node before which it stands.
        name: Its whole name; what follows the last slash, up to an underscore, is its operator.
        inputs: Its inputs.
        attributes: Its attributes.
        dtype: Type of its output.
        shape: Shape of its output.
        domain: Of the operator.

    Returns:
        Its output.
    """
    op_type = name.rpartition("/")[2].partition("_")[0]
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, name=name)
    (output,) = node.outputs
    output.name, output.dtype, output.shape = f"{name}_output_0", dtype, ir.Shape(shape)
    if reader.graph is None:
        raise AssertionError(f"{reader.name} must be in a graph")
    reader.graph.insert_before(reader, node)
    return output


def replace_node(node: ir.Node, output: ir.Value) -> None:
    """Let a value take the place of a node's only output, and remove the node."""
    graph, (old,) = node.graph, node.outputs
    if graph is None or not isinstance(graph, ir.Graph):
        raise AssertionError(f"{node.name} must be in a graph")
    if old in graph.outputs:
        output.name, old.name = old.name, None
        graph.outputs[graph.outputs.index(old)] = output
    old.replace_all_uses_with(output)
    graph.remove(node, safe=True)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node that makes a value, which must be one of some operators."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        found = "an input" if node is None else f"{node.name} ({node.op_type})"
        name = value.name if value is not None else None
        raise AssertionError(f"{name} must come from {' or '.join(op_types)}, not {found}")
    return node


def constant(graph: ir.Graph, array: npt.NDArray[Any], name: str) -> ir.Value:
    """A small initializer that the graph holds itself; equal names are one."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.val(
            name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor
        )
    return graph.initializers[name]


def integers(graph: ir.Graph, *values: int) -> ir.Value:
    """The constant int64 vector of some integers, under the name that the trace gives such."""
    text = ",".join(map(str, values))
    return constant(graph, np.array(values, np.int64), f"constant.int64[{text}]")


def integer(graph: ir.Graph, value: int) -> ir.Value:
    """The constant int64 scalar of an integer."""
    return constant(graph, np.array(value, np.int64), f"constant.int64({value})")


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """An input of a bundle's graph."""
    return next(value for value in graph.inputs if value.name == name)


def size_of(value: ir.Value | None, axis: int) -> int:
    """The size of an axis that is not dynamic."""
    size = None if value is None or value.shape is None else value.shape[axis]
    if size is None or not isinstance(size, int):
        name = None if value is None else value.name
        raise AssertionError(f"{name}: axis {axis} must have a known size, got {size}")
    return size
