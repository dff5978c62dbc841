"""Symbolic dimensions under the names users know: batch, sequence, capacity, num_logits."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["name_dimensions"]

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
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                names.get(dim.value or "", dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in _dims(value)
            )


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim]:
    if value.shape is None:
        raise AssertionError(f"{value.name} has no shape")
    return list(value.shape)
