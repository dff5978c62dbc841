"""`build`: from a checkpoint to a bundle. Read it as a table of contents."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qwen_export import passes
from qwen_export.checkpoint import (
    Checkpoint,
    TokenizerFiles,
    Tying,
    open_checkpoint,
    require_supported,
)
from qwen_export.describe import (
    describe,
    describe_quantization,
    source_name,
    template_files,
    write_manifest,
)
from qwen_export.errors import OptionError, OutputError, ParityError, TargetError
from qwen_export.formats import PRECISIONS, Recipe, native_precision
from qwen_export.model.parameters import parameters
from qwen_export.progress import Progress, no_progress
from qwen_export.quantization import BLOCK_SIZES, METHODS, Method, Quantizer, make_quantizer
from qwen_export.rotary import context_limit
from qwen_export.sources import stored_names, tensor_sources
from qwen_export.staging import install, require_absent, staging_folder
from qwen_export.targets.add import (
    CPU,
    add_cpu_graph,
    add_target,
    check_precision,
    check_targets,
)
from qwen_export.trace import Phase, trace
from qwen_export.weights import Source, WeightsFile, bind_weights, write_weights
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import Manifest

__all__ = ["EMBEDDED_MODEL", "BuildOptions", "build", "embedded_model"]

EMBEDDED_MODEL = "tiny-qwen2-chat"
PHASES: tuple[Phase, ...] = ("prefill", "decode")
WEIGHTS_FILE = "weights.bin"
_MOST_FAILED = 20
"""Names tried for a bundle that failed."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What `build` is asked for beside the model and the place."""

    precision: str | None = None
    """Format of the weights: fp32, int8 or int4; None for the checkpoint's own if it is quantised
    exactly, else fp32."""
    compute_dtype: str | None = None
    """Format of activations and caches in what ``targets`` add: "bf16", "fp16" or "fp32"; None for
    bf16. The portable graphs compute in fp32."""
    max_context: int | None = None
    """Longest row in tokens; None for the checkpoint's max_position_embeddings."""
    verify: bool = True
    """Prove parity with PyTorch, and refuse to deliver a bundle that fails."""
    block_size: int | None = None
    """Inputs that share a scale in a quantised weight: 32, 64 or 128, which must divide those of
    every weight; None for the precision's default, or the largest size below it that divides."""
    quantizer: Method | None = None
    """What chooses codes and scales; None for the precision's default, which does not round what
    the checkpoint stores quantised a second time."""
    calibration: Path | None = None
    """Text whose activations guide "gptq"."""
    keep: tuple[str, ...] = ()
    """Patterns, as of a shell, of the weights that are stored in fp32 instead of quantised."""
    targets: tuple[str, ...] = ()
    """What to build into the bundle with default options: engines for "tensorrt-rtx" and
    "tensorrt", graphs for "cuda". "cpu" says that the graph for the CPU must be there, which int8
    and int4 bundles have anyway, but for models that its operators do not take."""

    def __post_init__(self) -> None:
        _require_one_of("--precision", self.precision, PRECISIONS)
        _require_one_of("--block-size", self.block_size, BLOCK_SIZES)
        _require_one_of("--quantizer", self.quantizer, METHODS)
        if self.max_context is not None and self.max_context < 1:
            raise OptionError(f"--max-context must be at least 1 token, got {self.max_context}")
        if (self.quantizer == "gptq") != (self.calibration is not None):
            raise OptionError(
                "--quantizer gptq and --calibration FILE must be given together: gptq needs a "
                "text to be calibrated on, and no other method reads one"
            )
        _require_patterns("--keep", self.keep)
        if self.precision is not None:
            self.recipe(self.precision)

    def recipe(self, precision: str) -> Recipe | None:
        """How weights are quantised at a precision, which is the checkpoint's if none was asked for.

        Raises:
            OptionError: If an option has no use for it.
        """
        native = self.precision is None
        return Recipe.of(precision, self.block_size, self.quantizer, keep=self.keep, native=native)


def _require_one_of(option: str, value: object, known: Sequence[object]) -> None:
    # True == 1 and 32.0 == 32, hence the types.
    if value is not None and (type(value) is not type(known[0]) or value not in known):
        raise OptionError(f"{option} must be one of {', '.join(map(str, known))}, got {value!r}")


def _require_patterns(option: str, value: object) -> None:
    # A string is a sequence of strings, too.
    if not isinstance(value, tuple) or not all(
        isinstance(pattern, str) and pattern for pattern in value
    ):
        raise OptionError(f"{option} must be patterns of names of weights, got {value!r}")


def embedded_model() -> Path:
    """Folder of the small trained Qwen2 chat model that comes with the package."""
    return Path(str(resources.files("qwen_export").joinpath("data", EMBEDDED_MODEL)))


def build(
    model: str | Path | None,
    output: Path,
    options: BuildOptions | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Build a bundle.

    Threads may build at the same time; they trace one after the other, because tracing changes
    the process's warning filters.

    Args:
        model: A checkpoint's folder or hub id; None for the embedded model.
        output: The bundle's folder. It appears only when the bundle is complete.
        options: Precision, context and verification.
        revision: Branch, tag or commit of a hub id; the manifest records the commit it means.
        overwrite: Replace a bundle at ``output``.
        progress: Where to report long steps.

    Returns:
        The bundle at ``output``.

    Warns:
        UserWarning: If a quantised checkpoint becomes fp32 because no integers hold its weights
            exactly, or quantised weights have only the portable graphs because the operators of
            the one for the CPU do not take the model.

    Raises:
        OptionError: If an option has no use for this checkpoint.
        CheckpointError: If the checkpoint is missing, damaged or contradicts itself.
        UnsupportedModelError: If it asks for something that is not supported.
        OutputError: If ``output`` exists, appears during the build or cannot be written.
        TargetError: If an engine cannot be built; where that shows only when the bundle is complete,
            the bundle stays.
        ParityError: If the bundle does not answer like the checkpoint. It is left at
            ``output`` + ".failed", with the report, or where something else is in the way at the
            next free name, ".failed-2", ...; ``output`` itself is not touched.
    """
    options = options or BuildOptions()
    output = output.absolute()
    require_absent(output, overwrite=overwrite)
    check_targets(options.targets, options.compute_dtype)
    checkpoint = open_checkpoint(embedded_model() if model is None else model, revision=revision)
    require_supported(checkpoint.config)
    max_context = context_limit(checkpoint.config, options.max_context)
    tying = checkpoint.resolve_tying()
    exact_bits = {} if options.precision == "fp32" else checkpoint.exact_bits()
    precision = options.precision or native_precision(exact_bits.values())
    check_precision(options.targets, precision, output)
    recipe = options.recipe(precision)
    if exact_bits and recipe is None:
        _warn_of_fp32(checkpoint, exact_bits)
    quantizer = _calibrated(checkpoint, recipe, options.calibration)
    sources = tensor_sources(checkpoint, tying, max_context, recipe, quantizer, exact_bits)
    tokenizer = checkpoint.tokenizer_files()
    with staging_folder(output) as folder:
        graphs: dict[Phase, ir.Model] = {}
        for phase in PHASES:
            with progress(f"Tracing {phase}"):
                graphs[phase] = trace(
                    checkpoint.config, phase, tied=tying.tied, max_context=max_context
                )
        weights = _write_weights(checkpoint, tying, sources, folder, progress)
        for phase, graph in graphs.items():
            with progress(f"Checking {phase}"):
                _save_graph(graph, weights, folder / f"{phase}.onnx")
        _write_text_files(checkpoint, tokenizer, folder)
        quantization = None
        if recipe is not None:
            wanted = parameters(checkpoint.config, tied=tying.tied, max_context=max_context)
            quantization = describe_quantization(
                wanted, sources, tied=tying.tied, calibration=options.calibration
            )
        manifest = describe(
            checkpoint,
            tying,
            tokenizer,
            graphs,
            weights,
            max_context=max_context,
            precision=precision,
            compute_dtype="fp32",
            source=source_name(checkpoint, model),
            quantization=quantization,
        )
        hashes = {WEIGHTS_FILE: weights.sha256}
        write_manifest(manifest, folder, hashes)
        without = None
        if recipe is not None:
            without = add_cpu_graph(Bundle.open(folder), progress=progress)
        if options.verify:
            _verify(manifest, checkpoint, folder, output, hashes, progress)
        install(folder, output, overwrite=overwrite)
    bundle = Bundle.open(output)
    if without is not None and CPU not in options.targets:
        _warn_of_portable(output, without)
    for target in dict.fromkeys(options.targets):
        try:
            add_target(bundle, target, options.compute_dtype, progress=progress)
        except TargetError as error:
            raise TargetError(
                f"{output} is complete, but it has no engine for {target}: {error}",
                names=error.names,
            ) from error
    return bundle


def _warn_of_portable(output: Path, reason: TargetError) -> None:
    warnings.warn(
        f"{output} has no graph of its own for the CPU, which runs the portable one, more slowly: "
        f"{reason}",
        stacklevel=3,
    )


def _warn_of_fp32(checkpoint: Checkpoint, exact_bits: Mapping[str, int | None]) -> None:
    count = sum(bits is None for bits in exact_bits.values())
    warnings.warn(
        f"{checkpoint.path}: no symmetric integers hold {count} of its {len(exact_bits)} quantised "
        "weights exactly, so all become fp32, 4 bytes a weight; --precision int8 --quantizer search "
        "makes it about 1 byte and rounds them a second time, --precision fp32 says that fp32 is "
        "wanted",
        stacklevel=3,
    )


def _calibrated(
    checkpoint: Checkpoint, recipe: Recipe | None, calibration: Path | None
) -> Quantizer | None:
    """The quantizer of the linear layers, where it is one that wants a text."""
    if recipe is None or calibration is None:
        return None
    if checkpoint.quantized:
        raise OptionError(
            f"--quantizer gptq calibrates float weights, but {checkpoint.path} is quantised "
            "already; leave it out"
        )
    return make_quantizer(recipe.linears, checkpoint=checkpoint, calibration=calibration)


def _write_weights(
    checkpoint: Checkpoint,
    tying: Tying,
    sources: Sequence[Source],
    folder: Path,
    progress: Progress,
) -> WeightsFile:
    names = stored_names(tying)

    def check(name: str, block: npt.NDArray[np.float32]) -> None:
        if not name.startswith("model.rotary_emb."):
            checkpoint.check_finite(names.get(name, name), block)

    total = sum(source.num_bytes for source in sources)
    with progress("Writing weights", total, unit="B") as advance:
        return write_weights(folder / WEIGHTS_FILE, sources, check=check, progress=advance)


def _save_graph(graph: ir.Model, weights: WeightsFile, path: Path) -> None:
    passes.quantize(graph, weights.tensors)
    bind_weights(graph, weights, passes.TIED_ALIASES)
    passes.infer_shapes(graph)
    graph.producer_name, graph.producer_version = "qwen-export", metadata.version("qwen-export")
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)


def _write_text_files(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles | None, folder: Path
) -> None:
    (folder / "generation_config.json").write_text(_json(checkpoint.generation_config), "utf-8")
    if tokenizer is None:
        return
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json, "utf-8")
    for name, file in template_files(tokenizer).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(tokenizer.chat_templates[name], "utf-8")


def _verify(
    manifest: Manifest,
    checkpoint: Checkpoint,
    folder: Path,
    output: Path,
    hashes: Mapping[str, str],
    progress: Progress,
) -> None:
    # transformers costs seconds to import; a build without verification does not need it.
    from qwen_export.parity import verify

    report = verify(Bundle.open(folder), checkpoint, progress=progress)
    report.write(folder)
    tools = manifest.tools | {"transformers": metadata.version("transformers")}
    verified = replace(manifest, parity=report.summary(), tools=tools)
    write_manifest(verified, folder, hashes)
    if not report.passed:
        failed = _keep_failed(folder, output)
        where = f"are in {failed}" if failed else "could not be kept; make room beside the output"
        raise ParityError(
            f"the exported model does not answer like the original: {report.first_departure}; "
            f"the bundle and its report {where}",
            path=failed,
        )


def _keep_failed(folder: Path, output: Path) -> Path | None:
    """Leave a failed bundle beside the output: over an older failure, or under a free name."""
    for number in range(1, _MOST_FAILED + 1):
        suffix = ".failed" if number == 1 else f".failed-{number}"
        failed = output.with_name(output.name + suffix)
        try:
            install(folder, failed, overwrite=number == 1)
        except (OutputError, OSError):
            # Where a failed bundle is kept must not hide that it failed.
            continue
        return failed
    return None


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
