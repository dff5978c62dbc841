"""What `qwen-export inspect` shows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import onnx

from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.engine_file import ENGINES_FOLDER, EngineFolder, engine_names
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LOWERED_FOLDER, LoweredFolder, lowered_names
from qwen_runtime.manifest import GraphEntry, QualitySummary, QuantizationEntry

__all__ = ["describe_text", "engine_line", "lowered_line", "summary"]


COLUMNS = 80
"""Of the text, where what it shows has no longer words."""


def summary(bundle: Bundle) -> dict[str, object]:
    """The manifest and the operators of both graphs, for machines."""
    return {
        "bundle": str(bundle.path),
        "operators": {name: _operators(bundle, name) for name in bundle.manifest.graphs},
        "engines": {name: _engine_document(bundle, name) for name in engine_names(bundle.path)},
        "lowered": {name: _lowered_document(bundle, name) for name in lowered_names(bundle.path)},
        **asdict(bundle.manifest),
    }


def describe_text(bundle: Bundle) -> str:
    """The same for people."""
    manifest = bundle.manifest
    model = manifest.model
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} key/value heads"
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    needs = ", ".join(
        f"{name} >= {version}" for name, version in manifest.minimum_engine_versions.items()
    )
    lines = [
        f"{bundle.path}",
        *_row("built by", f"{manifest.producer}, {manifest.created}"),
        *_row("from", manifest.source + (f" at {manifest.revision}" if manifest.revision else "")),
        *_row(
            "model",
            f"{model.model_type}: {model.num_hidden_layers} layers, hidden {model.hidden_size}, "
            f"{heads} of {model.head_dim}, vocabulary {model.vocab_size}",
        ),
        *_row("precision", f"weights {manifest.precision}, compute {manifest.compute_dtype}"),
        *_quantization(manifest.quantization),
        *_row("max context", f"{manifest.max_context} tokens"),
        *_row("tokenizer", _tokenizer(bundle)),
        *_row("parity", _parity(bundle)),
        *_quality(bundle.manifest.parity.quality),
        *_row("tools", tools),
        *_row("needs", needs),
    ]
    for name, graph in manifest.graphs.items():
        lines += ["", f"{name}: {graph.file}", *_graph(bundle, name, graph)]
    lines += ["", "files"]
    lines += [
        f"  {entry.num_bytes:>13,}  {entry.sha256[:16]}  {name}"
        for name, entry in manifest.files.items()
    ]
    for name in engine_names(bundle.path):
        lines += ["", f"engine: {ENGINES_FOLDER}/{name}", *_engine(bundle, name)]
    for name in lowered_names(bundle.path):
        lines += ["", f"lowered: {LOWERED_FOLDER}/{name}", *_lowered(bundle, name)]
    return "\n".join(lines)


def _row(label: str, text: str) -> list[str]:
    """A labelled line of `COLUMNS`, continued under its text; breaks between items only."""
    indent = f"  {label:<13} "
    items = text.split(", ")
    lines, line = [], indent + items[0]
    for item in items[1:]:
        if len(line) + len(item) + len(", ,") > COLUMNS:
            lines.append(line + ",")
            line = " " * len(indent) + item
        else:
            line += f", {item}"
    return [*lines, line]


def engine_line(engine: EngineFolder) -> str:
    """One line on an engine: its size, what it serves, and that it was not executed."""
    description = engine.description
    size = sum(plan.num_bytes for plan in description.plans)
    return (
        f"{size / 1e6:.1f} MB, {description.compute_dtype}, {description.max_batch} rows of "
        f"{description.capacity} tokens, SM {', '.join(map(str, description.sms))}; not executed"
    )


def lowered_line(lowered: LoweredFolder) -> str:
    """One line on lowered graphs: size, type and attention, and whether they were proved."""
    description = lowered.description
    size = sum(entry.num_bytes for entry in description.files.values())
    if description.target == "cpu":
        proof = "verified" if _is_verified(lowered) else "not verified"
    else:
        proof = "not executed"
    return (
        f"{size / 1e3:,.0f} kB, {description.compute_dtype}, "
        f"{_ATTENTION[description.attention]}, over the bundle's weights; {proof}"
    )


_ATTENTION = {"group_query": "GroupQueryAttention", "mask": "attention under a mask"}
_REPORT = "parity.json"


def _is_verified(lowered: LoweredFolder) -> bool:
    """Whether the bundle's own parity report is about these very files, and they passed."""
    bundle = lowered.path.parent.parent
    try:
        report = json.loads((bundle / _REPORT).read_text("utf-8"))
        proved, hashes = report["passed"], dict(report["hashes"])
    except (OSError, ValueError, KeyError, TypeError):
        # A bundle that was not verified has no report, and what cannot be read proves nothing.
        return False
    files = [lowered.path / name for name in (LOWERED_FILE, *lowered.description.files)]
    return proved is True and all(
        hashes.get(file.relative_to(bundle).as_posix()) == sha256_of(file) for file in files
    )


def _lowered_document(bundle: Bundle, name: str) -> dict[str, object]:
    try:
        lowered = LoweredFolder.open(bundle, name)
    except BundleError as error:
        return {"unusable": str(error)}
    document = asdict(lowered.description)
    if lowered.description.target == "cpu":
        document["verified"] = _is_verified(lowered)
    return document


def _lowered(bundle: Bundle, name: str) -> list[str]:
    try:
        lowered = LoweredFolder.open(bundle, name)
    except BundleError as error:
        return [f"  unusable      {error}"]
    found = lowered.description
    needs = ", ".join(f"{key} >= {each}" for key, each in found.minimum_engine_versions.items())
    return [
        f"  {lowered_line(lowered)}",
        *_row("runs", _RUNS[found.target]),
        f"  made by       {found.producer}, {found.created}",
        *_row("needs", needs),
        *(
            f"  {graph.file:<13} {found.files[graph.file].num_bytes:,} bytes, sha256 "
            f"{found.files[graph.file].sha256[:16]}"
            for graph in found.graphs.values()
        ),
        f"  make again    {lowered.remake_command}",
    ]


_RUNS = {
    "cpu": "on the CPU, prompts and steps alike, in place of the portable graphs",
    "cuda": "on a GPU, with onnxruntime-gpu",
}


def _engine_document(bundle: Bundle, name: str) -> dict[str, object]:
    try:
        return asdict(EngineFolder.open(bundle, name).description)
    except BundleError as error:
        return {"unusable": str(error)}


def _engine(bundle: Bundle, name: str) -> list[str]:
    try:
        engine = EngineFolder.open(bundle, name)
    except BundleError as error:
        return [f"  unusable      {error}"]
    found = engine.description
    lines = [
        f"  {engine_line(engine)}",
        f"  built by      {found.producer} with {found.flavour} {found.version}, {found.created}",
        (
            f"  limits        {found.max_batch} rows, {found.max_sequence} new tokens a call, "
            f"{found.max_num_logits} logits a row, capacity {found.capacity}"
        ),
        f"  caches        {len(found.aliases)}, each updated in place",
    ]
    if found.fp16_range is not None:
        lines.append(
            f"  fp16 range    largest value {found.fp16_range.largest:,.0f} of 65,504, at "
            f"{found.fp16_range.node}, over {found.fp16_range.tokens} tokens"
        )
    lines += [f"  warning       {text}" for text in found.warnings]
    for plan in found.plans:
        weights = "unknown" if plan.weight_bytes is None else f"{plan.weight_bytes / 1e6:.1f} MB"
        lines.append(
            f"  {plan.file:<13} {plan.num_bytes:,} bytes from {plan.graph}.onnx: weights "
            f"{weights} of {plan.graph_weight_bytes / 1e6:.1f} MB, {len(plan.kernels)} kernels, "
            f"sha256 {plan.sha256[:16]}"
        )
        for profile in plan.profiles:
            sizes = ", ".join(
                f"{name} {size.min}-{size.max}" for name, size in profile.sizes.items()
            )
            scratch = (
                ""
                if profile.activation_bytes is None
                else f"; scratch {profile.activation_bytes / 1e6:.1f} MB"
            )
            lines.append(f"    {profile.name:<11} {sizes}{scratch}")
    lines.append(f"  build again   {engine.rebuild_command}")
    return lines


def _graph(bundle: Bundle, name: str, graph: GraphEntry) -> list[str]:
    operators = _operators(bundle, name)
    counts = ", ".join(f"{op} {count}" for op, count in operators.items())
    caches = [entry for entry in graph.inputs if entry.name.startswith("past_key_values.")]
    plain = [entry for entry in graph.inputs if entry not in caches]
    lines = _row(f"{sum(operators.values())} nodes", counts)
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


def _quantization(entry: QuantizationEntry | None) -> list[str]:
    """A line for each kind of weight, largest first."""
    if entry is None:
        return []
    lines = []
    for group in sorted(entry.groups, key=lambda group: -group.num_bytes):
        how = f", block {group.block_size}, {group.method}" if group.block_size else ""
        count = f"{group.num_tensors} tensor{'s' if group.num_tensors > 1 else ''}"
        lines.append(
            f"    {group.role:<11} {group.format}{how}: {count}, {group.num_bytes / 1e6:.1f} MB"
        )
    if entry.calibration_sha256 is not None:
        lines.append(f"    calibrated on a text with sha256 {entry.calibration_sha256[:16]}")
    return lines


def _quality(quality: QualitySummary | None) -> list[str]:
    if quality is None:
        return []
    return _row(
        "quality",
        f"as served: {quality.top1_agreement:.1%} of {quality.positions} tokens as the original's, "
        f"KL {quality.mean_kl:.2g} nats (largest {quality.max_kl:.2g})",
    )


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
