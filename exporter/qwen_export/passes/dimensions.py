"""Symbolic dimensions under the names users know: batch, sequence, capacity, num_logits."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["name_derived_dimensions", "name_dimensions"]

_AXES = {
    "input_ids": ("batch", "sequence"),
    "past_lengths": ("batch",),
    "logits_indices": ("batch", "num_logits"),
}
_CACHE_AXES = ("batch", "num_key_value_heads", "capacity", "head_dim")


def name_dimensions(model: ir.Model) -> None:
    """Rename the tracer's symbols (s34, s70, ...) wherever they occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = _AXES.get(value.name or "", _CACHE_AXES)
        for dim, name in zip(_dims(value), axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names[dim.value] = name
    _rename(model.graph, names)


def name_derived_dimensions(model: ir.Model) -> None:
    """Name the sizes that shape inference cannot follow and gives numbers (unk__0, ...).

    A Range over one axis of a tensor is as long as that axis, and the rows of a tensor that is
    flattened to [-1, width] are the product of its leading axes, such as "batch*num_logits".
    """
    names: dict[str, str] = {}
    for node in model.graph:
        size = {"Range": _range_length, "Reshape": _flattened_rows}.get(node.op_type)
        name = size(node) if size else None
        if name is not None:
            invented = _dims(node.outputs[0])[0]
            if isinstance(invented, ir.SymbolicDim) and invented.value is not None:
                names[invented.value] = name
    _rename(model.graph, names)


def _range_length(node: ir.Node) -> str | None:
    """The axis counted by Range(0, Squeeze(Shape(x, axis, axis + 1)), 1)."""
    start, limit, step = node.inputs
    squeeze = limit.producer() if limit is not None else None
    source = squeeze.inputs[0] if squeeze is not None and squeeze.op_type == "Squeeze" else None
    shape = source.producer() if source is not None else None
    if _integers(start) != [0] or _integers(step) != [1] or shape is None:
        return None
    if shape.op_type != "Shape" or shape.inputs[0] is None:
        return None
    first = shape.attributes.get_int("start", 0)
    axes = _dims(shape.inputs[0])[first : shape.attributes.get_int("end")]
    return _symbol(axes[0]) if len(axes) == 1 else None


def _flattened_rows(node: ir.Node) -> str | None:
    """The leading axes of x in Reshape(x, [-1, width]), where width is x's last axis."""
    x, shape = node.inputs
    if x is None or x.shape is None:
        return None
    *leading, width = x.shape
    if not isinstance(width, int) or _integers(shape) != [-1, width]:
        return None
    factors = [str(dim) if isinstance(dim, int) else _symbol(dim) for dim in leading if dim != 1]
    return "*".join(str(f) for f in factors) if factors and None not in factors else None


def _integers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(each) for each in value.const_value.numpy().reshape(-1)]


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _rename(graph: ir.Graph, names: Mapping[str, str]) -> None:
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                names.get(dim.value or "", dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in _dims(value)
            )


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim]:
    if value.shape is None:
        raise AssertionError(f"{value.name} has no shape")
    return list(value.shape)
