"""Norms and activations as ONNX Runtime's fused operators.

::

    x, y - Add - RMSNormalization    =>    SkipSimplifiedLayerNormalization, which gives both
    x - Sigmoid - Mul(x)             =>    QuickGelu(alpha=1)
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.lowering.nodes import CONTRIB, add_before, replace_node

__all__ = ["fuse_activations", "fuse_norms"]


def fuse_norms(model: ir.Model) -> None:
    """Fuse every norm with the addition it reads; a norm of anything else stands alone.

    Args:
        model: A bundle's graph, retyped or not; changed in place.
    """
    for node in [each for each in model.graph if each.op_type == "RMSNormalization"]:
        source = node.inputs[0]
        made_by = source.producer() if source is not None else None
        if made_by is not None and made_by.op_type == "Add" and not made_by.domain:
            _fuse(model.graph, made_by, node)
        else:
            _alone(node)


def fuse_activations(model: ir.Model) -> None:
    """Make ``x * sigmoid(x)`` one operator.

    Args:
        model: A bundle's graph, retyped or not; changed in place.
    """
    for sigmoid in [each for each in model.graph if each.op_type == "Sigmoid"]:
        (x,), (gates,) = sigmoid.inputs, sigmoid.outputs
        (product,) = (use.node for use in gates.uses())
        if product.op_type != "Mul" or set(product.inputs) != {x, gates}:
            raise AssertionError(f"{sigmoid.name} must be multiplied by what it reads")
        if x is None or x.dtype is None or x.shape is None:
            raise AssertionError(f"{sigmoid.name} must read a typed value")
        fused = add_before(
            product,
            f"{str(sigmoid.name).rpartition('/')[0]}/QuickGelu",
            [x],
            {"alpha": 1.0},
            dtype=x.dtype,
            shape=x.shape,
            domain=CONTRIB,
        )
        replace_node(product, fused)


def _fuse(graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=4,
        name=f"{str(norm.name).rpartition('/')[0]}/SkipSimplifiedLayerNormalization",
    )
    graph.insert_before(norm, node)
    normed, mean, inverse, total = node.outputs
    # Two outputs that only training reads: an empty name leaves them out.
    mean.name = inverse.name = ""
    normed.name, total.name = f"{node.name}_output_0", f"{node.name}_output_3"
    for new, old in ((normed, norm.outputs[0]), (total, add.outputs[0])):
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new)
    graph.remove([norm, add], safe=True)


def _alone(norm: ir.Node) -> None:
    """The same operator under the name that has a kernel for every type on CUDA."""
    (output,) = norm.outputs
    if output.dtype is None or output.shape is None:
        raise AssertionError(f"{norm.name} must give a typed value")
    normed = add_before(
        norm,
        f"{str(norm.name).rpartition('/')[0]}/SimplifiedLayerNormalization",
        norm.inputs,
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5), "axis": -1, "stash_type": 1},
        dtype=output.dtype,
        shape=output.shape,
    )
    replace_node(norm, normed)
