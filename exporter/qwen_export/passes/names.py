"""Names that mirror module paths: ``/model/layers.3/self_attn/q_proj/MatMul``."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

__all__ = ["name_after_modules"]

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_after_modules(model: ir.Model) -> None:
    """Name every node after the module it was traced in, and its values after the node."""
    graph = model.graph
    interface = {value.name for value in (*graph.inputs, *graph.outputs)}
    used: dict[str, int] = {}
    for node in graph:
        stem = f"{_module_path(node)}/{node.op_type}"
        count = used.get(stem, 0)
        used[stem] = count + 1
        node.name = f"{stem}_{count}" if count else stem
        for index, output in enumerate(node.outputs):
            if output.name not in interface:
                output.name = f"{node.name}_output_{index}"


def _module_path(node: ir.Node) -> str:
    """The innermost module, "model.layers.3.mlp" as "/model/layers.3/mlp"."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
    module = scopes[-2] if len(scopes) > 1 else ""
    if not re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*", module) or module.startswith("_empty"):
        return ""
    return "/" + re.sub(r"\.(?!\d)", "/", module)
