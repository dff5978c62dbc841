"""What `qwen-export inspect` shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import onnx

from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import GraphEntry

__all__ = ["describe_text", "summary"]


def summary(bundle: Bundle) -> dict[str, object]:
    """The manifest and the operators of both graphs, for machines."""
    return {
        "bundle": str(bundle.path),
        "operators": {name: _operators(bundle, name) for name in bundle.manifest.graphs},
        **asdict(bundle.manifest),
    }


def describe_text(bundle: Bundle) -> str:
    """The same for people."""
    manifest = bundle.manifest
    model = manifest.model
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} key/value heads"
    lines = [
        f"{bundle.path}",
        f"  built by      {manifest.producer}, {manifest.created}",
        f"  from          {manifest.source}"
        + (f" at {manifest.revision}" if manifest.revision else ""),
        (
            f"  model         {model.model_type}: {model.num_hidden_layers} layers, hidden "
            f"{model.hidden_size}, {heads} of {model.head_dim}, vocabulary {model.vocab_size}"
        ),
        f"  precision     weights {manifest.precision}, compute {manifest.compute_dtype}",
        f"  max context   {manifest.max_context} tokens",
        f"  tokenizer     {_tokenizer(bundle)}",
        f"  parity        {_parity(bundle)}",
        f"  tools         {', '.join(f'{k} {v}' for k, v in manifest.tools.items())}",
        f"  needs         {', '.join(f'{k} >= {v}' for k, v in manifest.minimum_engine_versions.items())}",
    ]
    for name, graph in manifest.graphs.items():
        lines += ["", f"{name}: {graph.file}", *_graph(bundle, name, graph)]
    lines += ["", "files"]
    lines += [
        f"  {entry.num_bytes:>13,}  {entry.sha256[:16]}  {name}"
        for name, entry in manifest.files.items()
    ]
    return "\n".join(lines)


def _graph(bundle: Bundle, name: str, graph: GraphEntry) -> list[str]:
    operators = _operators(bundle, name)
    counts = ", ".join(f"{op} {count}" for op, count in operators.items())
    caches = [entry for entry in graph.inputs if entry.name.startswith("past_key_values.")]
    plain = [entry for entry in graph.inputs if entry not in caches]
    lines = [f"  {sum(operators.values())} nodes: {counts}"]
    for arrow, entries in (("in ", plain), ("in ", caches[:1]), ("out", graph.outputs[:2])):
        for entry in entries:
            more = (
                f"  (and {len(caches) - 1} more)"
                if entry.name.startswith(("past_key", "present"))
                else ""
            )
            shape = ", ".join(map(str, entry.shape))
            lines.append(f"  {arrow} {entry.name:<24} {entry.dtype:<6} [{shape}]{more}")
    return lines


def _operators(bundle: Bundle, name: str) -> dict[str, int]:
    path = bundle.file(bundle.manifest.graphs[name].file)
    model = onnx.load(path, load_external_data=False)
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tokenizer(bundle: Bundle) -> str:
    entry = bundle.manifest.tokenizer
    if entry is None:
        return "none: a bundle of token ids"
    templates = ", ".join(entry.chat_templates)
    return f"yes, chat templates: {templates}" if templates else "yes, without a chat template"


def _parity(bundle: Bundle) -> str:
    parity = bundle.manifest.parity
    if parity.status == "not_verified":
        return "not verified"
    return (
        f"{parity.status}: max logit error {parity.max_logit_error:.2e}, tolerance "
        f"{parity.tolerance:.0e}, {parity.tokens_compared} tokens, {parity.ties} ties"
    )
