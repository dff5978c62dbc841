"""From the portable graph to the one an engine with 16-bit arithmetic wants.

    fp32 graph ── retype ── 16-bit graph ── Cast ── logits (float32)

The graph stays strongly typed: every float32 value takes the new type, caches and rotary tables
included, because RotaryEmbedding and TensorScatter want one type for all their operands, and
RMSNormalization computes in fp32 inside whatever its operands are.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.errors import TargetError

__all__ = ["COMPUTE_DTYPES", "fix_capacity", "retype"]

COMPUTE_DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
"""Types a graph can be retyped to, by the names users know."""

_LOGITS = "logits"
_BLOCK_VALUES = 1 << 24
"""Values cast at a time: bounds the float32 pages touched at once to 64 MB."""


def retype(model: ir.Model, dtype: ir.DataType) -> None:
    """Turn every float32 value of a graph into ``dtype``; ``logits`` stays float32 by a Cast.

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
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = dtype
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = _cast_later(tensor, dtype)
            value.dtype = dtype
    _keep_logits_float32(graph)


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
