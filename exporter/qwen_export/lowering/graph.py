"""From a bundle's portable graph to the one that ONNX Runtime runs best on CUDA, or on the CPU.

    portable graph ── retype ── count on the device ── attention ── linear layers ── tables ── norms

Read `lower_graph` as a table of contents. Every rewrite is exact but for rounding: in fp32 the
result is compared with the portable graph on ONNX Runtime's CPU provider, which has the same
operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import common

from qwen_export.lowering.attention import group_query
from qwen_export.lowering.inspect import inspect_lowered
from qwen_export.lowering.linear import lower_linears
from qwen_export.lowering.nodes import CONTRIB, replace_node
from qwen_export.lowering.norms import fuse_activations, fuse_norms
from qwen_export.lowering.options import LoweringOptions, Target
from qwen_export.lowering.positions import count_on_device
from qwen_export.lowering.stored import StoredInitializers
from qwen_export.lowering.tables import add_next_tokens, lower_embedding, lower_tied_head
from qwen_export.model import ops
from qwen_export.passes.retype import COMPUTE_DTYPES, retype
from qwen_runtime.backends.lowered_graph import SERVED_LEVEL
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_description import InitializerEntry

__all__ = ["LoweredGraph", "lower_graph"]


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """A rewritten graph."""

    model: ir.Model
    initializers: tuple[InitializerEntry, ...]
    """How those of its initializers are read that lie in the weights file."""


def lower_graph(
    bundle: Bundle,
    phase: Literal["prefill", "decode"],
    options: LoweringOptions,
    target: Target = "cuda",
) -> LoweredGraph:
    """Rewrite one of a bundle's graphs.

    Args:
        bundle: Gives the graph; its weights are not read.
        phase: "prefill", any number of new tokens a row, or "decode", one.
        options: Type and form.
        target: Provider that is to run it.

    Raises:
        TargetError: If an operator does not take the model's dimensions, or the result has a node
            that is not known to run there.
    """
    manifest = bundle.manifest
    model = ir.load(bundle.file(manifest.graphs[phase].file))
    stored = StoredInitializers.of(model.graph)
    if options.compute_dtype != "fp32":
        retype(model, COMPUTE_DTYPES[options.compute_dtype])
    count_on_device(model)
    if options.form == "group_query":
        group_query(model, stored)
    else:
        _inline_attention(model)
    common.RemoveUnusedNodesPass()(model)
    lower_linears(model, stored)
    if target == "cpu":
        _round_activations(model)
    lower_embedding(model)
    lower_tied_head(model)
    fuse_activations(model)
    fuse_norms(model)
    if phase == "decode":
        add_next_tokens(model)
    common.RemoveUnusedNodesPass()(model)
    _set_opsets(model)
    initializers = stored.bind(
        model.graph, manifest.weights.file, manifest.files[manifest.weights.file].num_bytes
    )
    inspect_lowered(
        model.graph, options, target, num_hidden_layers=manifest.model.num_hidden_layers
    )
    return LoweredGraph(model, initializers)


def _round_activations(model: ir.Model) -> None:
    """Have quantised weights meet activations rounded to int8, for which the CPU has kernels."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", SERVED_LEVEL))


def _inline_attention(model: ir.Model) -> None:
    """Put the standard operator in the place of every call of ``CachedAttention``."""
    for node in [each for each in model.graph if each.op_type == "CachedAttention"]:
        (old,) = node.outputs
        if old.dtype is None or old.shape is None:
            raise AssertionError(f"{node.name} must give a typed value")
        attention = ir.node("Attention", node.inputs[:4], name=f"{node.name}/Attention")
        (output,) = attention.outputs
        output.name, output.dtype, output.shape = (
            f"{attention.name}_output_0",
            old.dtype,
            old.shape,
        )
        model.graph.insert_before(node, attention)
        replace_node(node, output)
    model.functions.clear()


def _set_opsets(model: ir.Model) -> None:
    model.opset_imports.clear()
    model.opset_imports.update({"": ops.OPSET, CONTRIB: 1})
