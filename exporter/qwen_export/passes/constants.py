"""One initializer per distinct small constant, instead of one Constant node per use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["constant", "share_constants"]


def share_constants(model: ir.Model) -> None:
    """Replace Constant nodes by initializers that equal constants share."""
    for node in list(model.graph):
        if node.op_type != "Constant" or node.domain:
            continue
        node.outputs[0].replace_all_uses_with(constant(model.graph, _value(node)))
        model.graph.remove(node, safe=True)


def constant(graph: ir.Graph, array: npt.NDArray[np.generic]) -> ir.Value:
    """The initializer of a small constant, made if the graph has none yet."""
    name = _name(array)
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.val(name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
        )
    return graph.initializers[name]


def _value(node: ir.Node) -> np.ndarray:
    if len(node.attributes) != 1:
        raise AssertionError(f"{node.name}: a Constant has one attribute, not {node.attributes}")
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        return attribute.as_tensor().numpy()
    dtype = np.int64 if attribute.name.startswith("value_int") else np.float32
    return np.asarray(attribute.value, dtype=dtype)


def _name(array: np.ndarray) -> str:
    """The value itself, so that a graph viewer shows it: ``constant.int64[0,0,8,32]``."""
    text = ",".join(str(item) for item in array.ravel().tolist())
    return f"constant.{array.dtype}" + (f"[{text}]" if array.ndim else f"({text})")
