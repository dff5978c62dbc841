"""From the portable graph to the one an engine with 16-bit arithmetic wants.

    fp32 graph ── retype ── 16-bit graph ── Cast ── logits (float32)

The graph stays strongly typed: every float32 value takes the new type, caches and rotary tables
included, because RotaryEmbedding and TensorScatter want one type for all their operands, and
RMSNormalization computes in fp32 inside whatever its operands are.

float16 ends at 65,504, which the sums of Qwen2's residual stream exceed. So with that type the
stream and the norms that read it stay float32, between Casts::

    x (fp32) ─┬─ RMSNormalization ─ Cast ─ linear layers (fp16) ─ Cast ─ Add ─ x (fp32)
              └──────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.errors import TargetError

__all__ = ["COMPUTE_DTYPES", "fix_capacity", "residual_nodes", "retype"]

COMPUTE_DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
"""Types a graph can be retyped to, by the names users know."""

_LOGITS = "logits"
_RESIDUAL = re.compile(
    r"/model/layers\.\d+/(Add(_1)?|(input|post_attention)_layernorm/RMSNormalization)"
    r"|/GatherND|/model/norm/RMSNormalization"
)
"""Nodes whose operands and results are the residual stream and what norms make of it."""
_BLOCK_VALUES = 1 << 24
"""Values cast at a time: bounds the float32 pages touched at once to 64 MB."""


def retype(model: ir.Model, dtype: ir.DataType) -> None:
    """Turn float32 values of a graph into ``dtype``; ``logits`` stays float32 by a Cast.

    With FLOAT16 the residual stream and its norms stay float32 as well.

    Weights are not read here. Each becomes a tensor that casts itself when its data are asked
    for, and keeps nothing: who hands weights to an engine holds one type of them at a time.

    Args:
        model: A graph whose weights are bound; changed in place.
        dtype: One of `COMPUTE_DTYPES`.

    Raises:
        TargetError: If ``dtype`` is not offered, or a node names float32 or holds a tensor in an
            attribute, which renaming types would not reach.
    """
    if dtype not in COMPUTE_DTYPES.values():
        raise TargetError(
            f"a graph can be retyped to {' or '.join(COMPUTE_DTYPES)}, got {dtype}",
            names=[str(dtype)],
        )
    graph = model.graph
    _refuse_typed_attributes(graph)
    exact = residual_nodes(graph) if dtype == ir.DataType.FLOAT16 else ()
    kept = {value for node in exact for value in _own_values(node, exact)}
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.dtype == ir.DataType.FLOAT and value not in kept:
            value.dtype = dtype
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and value not in kept:
            value.const_value = _cast_later(tensor, dtype)
            value.dtype = dtype
    _cast_around(exact, dtype)
    _keep_logits_float32(graph)


def residual_nodes(graph: ir.Graph) -> tuple[ir.Node, ...]:
    """The additions to the residual stream, the norms that read it, and what selects its rows.

    Raises:
        TargetError: If they are not two additions and two norms a layer, and the last norm.
    """
    found = tuple(node for node in graph if _RESIDUAL.fullmatch(node.name or ""))
    layers = sum(node.op_type == "CachedAttention" for node in graph)
    counts = {
        op_type: sum(node.op_type == op_type for node in found)
        for op_type in ("Add", "RMSNormalization")
    }
    if counts != {"Add": 2 * layers, "RMSNormalization": 2 * layers + 1}:
        raise TargetError(
            f"a graph of {layers} layers must have {2 * layers} additions to its residual stream "
            f"and {2 * layers + 1} norms of it, found {counts['Add']} and "
            f"{counts['RMSNormalization']}; build the engine with bf16, which needs neither"
        )
    return found


def fix_capacity(model: ir.Model, capacity: int) -> None:
    """Give the caches a fixed capacity, in tokens.

    Args:
        model: A graph with a dynamic dimension "capacity"; changed in place.
        capacity: Slots per row, at least 1 and at most the rows of the rotary tables.

    Raises:
        TargetError: If the capacity is out of range, or the graph's capacity is fixed already.
    """
    limit = _rotary_rows(model.graph)
    if type(capacity) is not int or not 1 <= capacity <= limit:
        raise TargetError(
            f"capacity must be 1 to {limit} tokens, the positions the graph has rotations for, "
            f"got {capacity!r}",
            names=["capacity"],
        )
    graph, found = model.graph, False
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.shape is not None and "capacity" in map(_symbol, value.shape):
            found = True
            value.shape = ir.Shape(
                capacity if _symbol(dim) == "capacity" else dim for dim in value.shape
            )
    if not found:
        raise TargetError(
            "the graph must have a dynamic dimension 'capacity' to be fixed, but has none; "
            "start from the bundle's own graph",
            names=["capacity"],
        )


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _rotary_rows(graph: ir.Graph) -> int:
    """Positions covered by every rotary table of the graph."""
    rows = []
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            table = node.inputs[1]
            if table is None or table.shape is None or not isinstance(table.shape[0], int):
                raise AssertionError(f"{node.name}: the rotary table must have a known shape")
            rows.append(table.shape[0])
    return min(rows)


def _refuse_typed_attributes(graph: ir.Graph) -> None:
    for node in graph:
        for name, attribute in node.attributes.items():
            is_float = name in ("to", "dtype") and attribute.as_int() == ir.DataType.FLOAT
            if is_float or attribute.type == ir.AttributeType.TENSOR:
                raise TargetError(
                    f"{node.name}: {node.op_type} must not fix a type in its attribute "
                    f"{name!r}; this graph cannot be retyped",
                    names=[node.name or ""],
                )


def _own_values(node: ir.Node, exact: Collection[ir.Node]) -> Iterator[ir.Value]:
    """What a node that stays float32 produces, and the weights that only such nodes read."""
    yield from node.outputs
    for value in node.inputs:
        if value is None or not value.is_initializer():
            continue
        if all(use.node in exact for use in value.uses()):
            yield value


def _cast_around(exact: Sequence[ir.Node], dtype: ir.DataType) -> None:
    """Put one Cast on every value that enters or leaves the nodes that stay float32."""
    for node in exact:
        for value in node.inputs:
            if value is not None and value.dtype == dtype:
                _cast_for(
                    value, ir.DataType.FLOAT, [use for use in value.uses() if use.node in exact]
                )
    for node in exact:
        (value,) = node.outputs
        # A Cast, or the count of its rows, takes the value as it is.
        takes_any = [use for use in value.uses() if use.node.op_type in ("Cast", "Shape")]
        readers = [use for use in value.uses() if use.node not in exact and use not in takes_any]
        if readers:
            _cast_for(value, dtype, readers)


def _cast_for(value: ir.Value, dtype: ir.DataType, readers: Sequence[tuple[ir.Node, int]]) -> None:
    """Let some readers of a node's result take it through a Cast."""
    producer = value.producer()
    if producer is None or producer.graph is None:
        raise AssertionError(f"{value.name} must be the result of a node of the graph")
    name = f"{producer.name}/Cast"
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    (result,) = node.outputs
    result.name, result.dtype, result.shape = f"{name}_output_0", dtype, value.shape
    producer.graph.insert_after(producer, node)
    for reader, index in readers:
        reader.replace_input_with(index, result)


def _cast_later(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    def cast() -> ir.TensorProtocol:
        return ir.Tensor(_cast(tensor, dtype), dtype, name=tensor.name)

    return ir.LazyTensor(cast, dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> npt.NDArray[np.generic]:
    """Cast in blocks, and give the source's mapped pages back."""
    source = tensor.numpy().reshape(-1)
    target = np.empty(source.shape, dtype.numpy())
    limit = _largest(dtype)
    for start in range(0, source.size, _BLOCK_VALUES):
        block = source[start : start + _BLOCK_VALUES]
        largest = float(np.max(np.abs(block), initial=0.0))
        # A NaN compares false as well.
        if not largest <= limit:
            raise TargetError(
                f"{tensor.name}: values must be within ±{limit:.5g} for {dtype.name.lower()}, "
                f"got {largest:.5g}; choose bf16, whose range is float32's",
                names=[tensor.name or ""],
            )
        target[start : start + _BLOCK_VALUES] = block
        del block
    del source
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return target.reshape(tensor.shape.numpy())


def _largest(dtype: ir.DataType) -> float:
    """The largest finite value of a float type."""
    if dtype == ir.DataType.FLOAT16:
        return float(np.finfo(np.float16).max)
    # bfloat16: eight bits of significand under float32's exponents.
    return math.ldexp(2 - 2**-7, 127)


def _keep_logits_float32(graph: ir.Graph) -> None:
    for index, value in enumerate(graph.outputs):
        if value.name != _LOGITS:
            continue
        producer = value.producer()
        if producer is None or producer.name is None:
            raise AssertionError("logits must come from a named node")
        value.name = f"{producer.name}_output_0"
        node = ir.node(
            "Cast",
            [value],
            attributes={"to": ir.DataType.FLOAT},
            name=f"{producer.name.rpartition('/')[0]}/Cast",
        )
        (logits,) = node.outputs
        logits.name, logits.dtype, logits.shape = _LOGITS, ir.DataType.FLOAT, value.shape
        graph.append(node)
        graph.outputs[index] = logits
        return
    raise AssertionError("the graph must have an output named logits")
