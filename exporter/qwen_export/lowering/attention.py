"""Attention over the cache as one GroupQueryAttention, which also rotates and writes the cache.

With one packed product in front of it, where nothing stands between projections and rotation::

    x - qkv_proj ----------------------- GroupQueryAttention(do_rotary) - o_proj

With norms of queries and keys::

    x - q_proj - q_norm -+
      - k_proj - k_norm -+- GroupQueryAttention(do_rotary) - o_proj
      - v_proj ----------+

Its own rotation wants a head_dim that 16 divides; elsewhere RotaryEmbedding stands before it. The
cache of a row is written from seqlens_k + 1 - S on, as past_lengths says.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwen_export.errors import TargetError
from qwen_export.lowering.linear import Linear, pack
from qwen_export.lowering.nodes import CONTRIB, add_before, integers, producer, size_of
from qwen_export.lowering.positions import last_positions, positions_of
from qwen_export.lowering.stored import StoredInitializers

__all__ = ["TOTAL_LENGTH", "group_query"]

TOTAL_LENGTH = "total_sequence_length"
"""The input that GroupQueryAttention reads on the CPU: past and new tokens of the longest row; for
a decode step anything from there to the capacity."""
_HEAD_UNIT = 8
_ROTARY_UNIT = 16


def group_query(model: ir.Model, stored: StoredInitializers) -> None:
    """Replace every ``CachedAttention`` and what leads to it.

    Args:
        model: A bundle's graph, retyped or not; changed in place. It gains the input
            ``total_sequence_length`` [1] int32.
        stored: Where packed weights are described.

    Raises:
        TargetError: If the operator does not take the model's head_dim.
    """
    graph = model.graph
    total = ir.val(TOTAL_LENGTH, dtype=ir.DataType.INT32, shape=ir.Shape([1]))
    graph.inputs.insert(_first_cache(graph), total)
    lengths: ir.Value | None = None
    for node in list(graph):
        if node.op_type == "CachedAttention":
            layer = _Layer.of(node)
            if lengths is None:
                _check_head_dim(node, layer.head_dim)
                first = _first_reader(graph)
                lengths = add_before(
                    first,
                    "/model/Cast_seqlens",
                    [last_positions(graph, first)],
                    {"to": ir.DataType.INT32},
                    dtype=ir.DataType.INT32,
                    shape=_dims(graph.inputs[1]),
                )
            _replace(graph, layer, stored, lengths, total)
    model.functions.clear()


def _first_cache(graph: ir.Graph) -> int:
    return next(i for i, v in enumerate(graph.inputs) if str(v.name).startswith("past_key"))


def _first_reader(graph: ir.Graph) -> ir.Node:
    """The first node of the graph, before which everything that only reads inputs may stand."""
    return next(iter(graph))


def _check_head_dim(node: ir.Node, head_dim: int) -> None:
    if head_dim % _HEAD_UNIT:
        raise TargetError(
            f"GroupQueryAttention needs a head_dim that {_HEAD_UNIT} divides, got {head_dim}; "
            "for cuda, --compute-dtype fp32 keeps standard attention",
            names=[str(node.name)],
        )


@dataclass(frozen=True, slots=True)
class _Projection:
    """Queries, keys or values of a layer on their way to attention."""

    linear: ir.Value
    """What the projection gives, [B, S, heads * head_dim]."""
    norm: ir.Node | None
    rotary: ir.Node | None
    num_heads: int

    @classmethod
    def of(cls, value: ir.Value | None) -> _Projection:
        """Walk back from heads [B, heads, S, head_dim]."""
        num_heads = size_of(value, 1)
        rotary = norm = None
        node = producer(value, "RotaryEmbedding", "RMSNormalization", "Transpose", "Reshape")
        if node.op_type == "RotaryEmbedding":
            rotary = node
            node = producer(node.inputs[0], "RMSNormalization", "Transpose", "Reshape")
        if node.op_type == "RMSNormalization":
            norm = node
            node = producer(node.inputs[0], "Transpose", "Reshape")
        if node.op_type == "Transpose":
            node = producer(node.inputs[0], "Reshape")
        linear = node.inputs[0]
        if linear is None:
            raise AssertionError(f"{node.name} must split a projection into heads")
        return cls(linear, norm, rotary, num_heads)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention, found in the portable graph."""

    node: ir.Node
    q: _Projection
    k: _Projection
    v: _Projection
    key_scatter: ir.Node
    value_scatter: ir.Node
    merged: ir.Node
    """The node that gives [B, S, heads * head_dim]."""
    head_dim: int
    window: int | None

    @classmethod
    def of(cls, node: ir.Node) -> _Layer:
        q, keys, values, mask, _ = node.inputs
        key_scatter = producer(keys, "TensorScatter")
        value_scatter = producer(values, "TensorScatter")
        (merged,) = (use.node for use in node.outputs[0].uses())
        if merged.op_type == "Transpose":
            (merged,) = (use.node for use in merged.outputs[0].uses())
        return cls(
            node,
            _Projection.of(q),
            _Projection.of(key_scatter.inputs[1]),
            _Projection.of(value_scatter.inputs[1]),
            key_scatter,
            value_scatter,
            merged,
            size_of(keys, 3),
            _window(mask),
        )


def _window(mask: ir.Value | None) -> int | None:
    """Tokens that a mask leaves visible, None for all."""
    node = producer(mask, "LessOrEqual", "And")
    if node.op_type == "LessOrEqual":
        return None
    first_hidden = producer(producer(node.inputs[1], "Greater").inputs[1], "Sub").inputs[1]
    if first_hidden is None or first_hidden.const_value is None:
        raise AssertionError(f"{node.name}: the window must be a constant")
    return int(first_hidden.const_value.numpy().item())


def _replace(
    graph: ir.Graph,
    layer: _Layer,
    stored: StoredInitializers,
    lengths: ir.Value,
    total: ir.Value,
) -> None:
    prefix = str(layer.node.name).rpartition("/")[0]
    rotates = layer.head_dim % _ROTARY_UNIT == 0
    packed = None
    if rotates and layer.q.norm is None:
        linears = [Linear.of(each.linear) for each in (layer.q, layer.k, layer.v)]
        packed = pack(graph, linears, stored, f"{prefix}/qkv_proj")
    inputs: list[ir.Value | None] = [packed, None, None]
    if packed is None:
        inputs = [
            _heads(graph, layer, each, f"{prefix}/{name}", rotates=rotates)
            for each, name in ((layer.q, "q"), (layer.k, "k"), (layer.v, "v"))
        ]
    rotary = layer.q.rotary
    if rotary is None:
        raise AssertionError(f"{prefix}: queries must be rotated")
    attributes: dict[str, int] = {
        "num_heads": layer.q.num_heads,
        "kv_num_heads": layer.k.num_heads,
        "do_rotary": int(rotates),
        "local_window_size": -1 if layer.window is None else layer.window,
    }
    node = ir.node(
        "GroupQueryAttention",
        [
            *inputs,
            layer.key_scatter.inputs[0],
            layer.value_scatter.inputs[0],
            lengths,
            total,
            *(rotary.inputs[1:3] if rotates else ()),
        ],
        attributes,
        domain=CONTRIB,
        num_outputs=3,
        name=f"{prefix}/GroupQueryAttention",
    )
    olds = (layer.merged, layer.key_scatter, layer.value_scatter)
    graph.insert_before(layer.node, node)
    for new, old in zip(node.outputs, (each.outputs[0] for each in olds), strict=True):
        new.type, new.shape = old.type, old.shape
        if old in graph.outputs:
            new.name, old.name = old.name, None
            graph.outputs[graph.outputs.index(old)] = new
        else:
            new.name = f"{node.name}_output_0"
        old.replace_all_uses_with(new)


def _heads(
    graph: ir.Graph, layer: _Layer, each: _Projection, prefix: str, *, rotates: bool
) -> ir.Value:
    """Queries, keys or values [B, S, heads * head_dim], with their norm and rotation."""
    value, before, dtype = each.linear, layer.node, each.linear.dtype
    flat = value.shape
    if flat is None or dtype is None:
        raise AssertionError(f"{value.name} must have a type and a shape")
    width = each.num_heads * layer.head_dim
    if each.norm is not None:
        split = [flat[0], flat[1], each.num_heads, layer.head_dim]
        value = add_before(
            before,
            f"{prefix}_norm/Reshape",
            [value, integers(graph, 0, 0, each.num_heads, layer.head_dim)],
            dtype=dtype,
            shape=split,
        )
        value = add_before(
            before,
            f"{prefix}_norm/RMSNormalization",
            [value, each.norm.inputs[1]],
            {name: attribute.value for name, attribute in each.norm.attributes.items()},
            dtype=dtype,
            shape=split,
        )
        value = add_before(
            before,
            f"{prefix}_norm/Reshape_1",
            [value, integers(graph, 0, 0, width)],
            dtype=dtype,
            shape=flat,
        )
    if each.rotary is not None and not rotates:
        value = add_before(
            before,
            f"{prefix}_rotary/RotaryEmbedding",
            [value, *each.rotary.inputs[1:3], positions_of(each.rotary)],
            {"num_heads": each.num_heads},
            dtype=dtype,
            shape=flat,
        )
    return value


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim]:
    return list(value.shape or ())
