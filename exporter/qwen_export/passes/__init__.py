"""Rewrites of a traced graph, one a file, and the order they run in."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qwen_export.passes.constants import share_constants
from qwen_export.passes.dimensions import name_derived_dimensions, name_dimensions
from qwen_export.passes.functions import define_cached_attention
from qwen_export.passes.names import name_after_modules
from qwen_export.passes.quantize import TIED_ALIASES, quantize

__all__ = [
    "TIED_ALIASES",
    "clean",
    "define_cached_attention",
    "infer_shapes",
    "name_after_modules",
    "name_derived_dimensions",
    "name_dimensions",
    "quantize",
    "share_constants",
]


def clean(model: ir.Model) -> ir.Model:
    """Turn a raw trace into the graph that is shipped."""
    share_constants(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    define_cached_attention(model)
    name_dimensions(model)
    name_after_modules(model)
    common.ClearMetadataAndDocStringPass()(model)
    return model


def infer_shapes(model: ir.Model) -> None:
    """Give every value its type and shape; the weights must be bound.

    A contradiction between shapes is left to the checker, which runs over the saved graph.

    Raises:
        AssertionError: If a value is left without a shape; the reason has been logged.
    """
    common.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
    name_derived_dimensions(model)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None or value.type is None:
                raise AssertionError(f"{node.name}: shape inference failed at {value.name}")
