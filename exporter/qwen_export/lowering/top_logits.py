"""The graph that finds the highest logits of a row where they are, for sampling.

::

    logits [batch, V] -- TopK -- top_logits [batch, K], the highest first
                             '-- top_tokens [batch, K], their ids

A graph of its own, so that a step pays for it only where somebody draws from its result. The CUDA
provider has the operator for float32 at this opset (its second argument, K, is read on the host and
is a constant here); up to K = 256 it looks at a row with many blocks at once, beyond with one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.lowering.nodes import constant
from qwen_export.model import ops

__all__ = ["top_logits_graph"]


def top_logits_graph(vocab_size: int, count: int) -> ir.Model:
    """Make the graph.

    Args:
        vocab_size: Logits of a row.
        count: How many of them it finds; all where there are fewer.
    """
    count = min(count, vocab_size)
    batch = ir.SymbolicDim("batch")
    logits = ir.val("logits", dtype=ir.DataType.FLOAT, shape=ir.Shape([batch, vocab_size]))
    graph = ir.Graph([logits], [], nodes=[], name="top_logits", opset_imports={"": ops.OPSET})
    wanted = constant(graph, np.array([count], np.int64), f"constant.int64[{count}]")
    node = ir.node("TopK", [logits, wanted], {"axis": -1}, name="/TopK", num_outputs=2)
    for output, name, dtype in zip(
        node.outputs,
        ("top_logits", "top_tokens"),
        (ir.DataType.FLOAT, ir.DataType.INT64),
        strict=True,
    ):
        output.name, output.dtype, output.shape = name, dtype, ir.Shape([batch, count])
    graph.append(node)
    graph.outputs.extend(node.outputs)
    return ir.Model(graph, ir_version=10)
