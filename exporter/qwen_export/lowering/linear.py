"""Linear layers: MatMulNBits where weights are quantised, and one product instead of three.

A quantised layer, whose codes become the arrangement that MatMulNBits reads::

    codes - DequantizeLinear - MatMul - Add      =>      MatMulNBits(x, codes, scales, bias)

ONNX Runtime would fuse that itself, with a copy of the weights in every session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qwen_export.errors import TargetError
from qwen_export.lowering.nodes import CONTRIB, add_before, producer, replace_node
from qwen_export.lowering.stored import StoredInitializers

__all__ = ["Linear", "lower_linears", "pack"]

_BITS: dict[str, Literal[4, 8]] = {"int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the portable graph: ``x @ weight``, and a bias where it has one."""

    x: ir.Value
    weight: ir.Value
    """The initializer of floats or codes, [K, N]."""
    scales: ir.Value | None
    """Of quantised weights, [K / block, N]."""
    bias: ir.Value | None
    last: ir.Node
    """The node that gives the result."""

    @classmethod
    def of(cls, value: ir.Value) -> Linear:
        """The layer that gives a value."""
        last = node = producer(value, "MatMul", "Add")
        bias = None
        if node.op_type == "Add":
            bias = node.inputs[1]
            node = producer(node.inputs[0], "MatMul")
        x, weight = node.inputs
        if x is None or weight is None:
            raise AssertionError(f"{node.name} must have two operands")
        scales = None
        if not weight.is_initializer():
            weight, scales = producer(weight, "DequantizeLinear").inputs[:2]
        if weight is None or weight.shape is None or not weight.is_initializer():
            raise AssertionError(f"{node.name} must multiply by a weight")
        return cls(x, weight, scales, bias, last)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        if self.weight.shape is None:
            raise AssertionError(f"{self.weight.name} must have a shape")
        inputs, outputs = self.weight.shape.numpy()
        return inputs, outputs

    @property
    def block_size(self) -> int | None:
        """Inputs that share a scale; None for floats."""
        if self.scales is None or self.scales.shape is None:
            return None
        return self.weight_shape[0] // int(self.scales.shape.numpy()[0])


def lower_linears(model: ir.Model, stored: StoredInitializers) -> None:
    """Replace every product with dequantised weights.

    Args:
        model: A bundle's graph, retyped or not; changed in place.
        stored: Where the arrangement of codes is described.

    Raises:
        TargetError: If MatMulNBits has no form for the codes.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        made_by = weight.producer() if weight is not None else None
        if made_by is None or made_by.op_type != "DequantizeLinear":
            continue
        (output,) = node.outputs
        uses = [use.node for use in output.uses()]
        biased = len(uses) == 1 and uses[0].op_type == "Add" and _is_bias(uses[0].inputs[1])
        linear = Linear.of(uses[0].outputs[0] if biased else output)
        stem = str(node.name).rpartition("/")[0]
        replace_node(linear.last, _product(model.graph, [linear], stored, stem, None))


def pack(
    graph: ir.Graph, linears: Sequence[Linear], stored: StoredInitializers, name: str
) -> ir.Value | None:
    """One product with the weights of several layers side by side.

    Args:
        graph: The graph they are in.
        linears: Layers that read the same value.
        stored: Where the packed weights are described.
        name: Of the packed layer, "/model/layers.0/self_attn/qkv_proj".

    Returns:
        Their results side by side, [B, S, sum of N]; None where one of them is stored in another
        form than the others, so that no product takes them together.
    """
    forms = {(each.x, each.weight.dtype, each.block_size, each.bias is None) for each in linears}
    return None if len(forms) > 1 else _product(graph, linears, stored, name, _dotted(name))


def _product(
    graph: ir.Graph,
    linears: Sequence[Linear],
    stored: StoredInitializers,
    stem: str,
    packed: str | None,
) -> ir.Value:
    """The product of one layer, or of several that are packed under a name of their own."""
    first = linears[0]
    inputs = first.weight_shape[0]
    outputs = sum(each.weight_shape[1] for each in linears)
    if first.x.shape is None or first.x.dtype is None:
        raise AssertionError(f"{first.x.name} must have a type and a shape")
    shape = [*first.x.shape[:2], outputs]
    dtype = first.x.dtype
    bias = first.bias
    if packed is not None and first.bias is not None:
        names = [str(each.bias.name) for each in linears if each.bias is not None]
        bias = stored.make(graph, f"{packed}.bias", names, dtype, [outputs])
    weights = [str(each.weight.name) for each in linears]
    name = f"{packed}.weight" if packed is not None else weights[0]
    if first.scales is None:
        weight = stored.make(graph, name, weights, dtype, [inputs, outputs], axis=1)
        result = add_before(
            first.last, f"{stem}/MatMul", [first.x, weight], dtype=dtype, shape=shape
        )
        if bias is None:
            return result
        return add_before(first.last, f"{stem}/Add", [result, bias], dtype=dtype, shape=shape)
    bits, block = _form(first)
    blocks = inputs // block
    codes = stored.make(
        graph,
        name,
        weights,
        ir.DataType.UINT8,
        [outputs, blocks, block * bits // 8],
        layout="matmul_nbits",
        axis=1,
        block_size=block,
    )
    scale_names = [str(each.scales.name) for each in linears if each.scales is not None]
    scales = stored.make(
        graph,
        f"{packed}.weight_scale" if packed is not None else scale_names[0],
        scale_names,
        dtype,
        [outputs, blocks],
        layout="matmul_nbits_scales",
        axis=1,
    )
    return add_before(
        first.last,
        f"{stem}/MatMulNBits",
        [first.x, codes, scales, *([None, None, bias] if bias is not None else [])],
        {"K": inputs, "N": outputs, "bits": bits, "block_size": block},
        dtype=dtype,
        shape=shape,
        domain=CONTRIB,
    )


def _form(linear: Linear) -> tuple[int, int]:
    """Bits and block size of quantised weights."""
    dtype, block = linear.weight.dtype, linear.block_size
    bits = _BITS.get(dtype.name.lower()) if dtype is not None else None
    if bits is None or block is None:
        raise TargetError(
            f"{linear.weight.name} must be int4 or int8 for MatMulNBits, got {dtype}",
            names=[str(linear.weight.name)],
        )
    return bits, block


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _dotted(name: str) -> str:
    """A node's name as its module's: "/model/layers.0/x" is "model.layers.0.x"."""
    return name.strip("/").replace("/", ".")
