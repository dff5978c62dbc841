"""`plan`: what a model will cost, before it is built. Read it as a table of contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_export.bundle import BuildOptions
from qwen_export.checkpoint import ModelConfig
from qwen_export.errors import ExportError, OptionError
from qwen_export.formats import PRECISIONS, native_precision
from qwen_export.planning.build_memory import build_peak, calibration_bytes, verify_peak
from qwen_export.planning.memory import (
    COMPUTE_BYTES,
    Layout,
    RunMemory,
    is_lowered,
    kv_bytes,
    run_memory,
)
from qwen_export.planning.settings import Setting, settings
from qwen_export.planning.sizes import (
    DiskSize,
    disk_size,
    packed_cache_bytes,
    parameter_counts,
    stored_bytes,
)
from qwen_export.planning.source import Source, open_source
from qwen_export.planning.speed import Speed, expected_speed
from qwen_export.quantization.options import Method
from qwen_export.quantization.quantizer import BlockwiseQuantizer
from qwen_export.rotary import context_limit
from qwen_export.sources import tensor_sources
from qwen_runtime.bandwidth import available_threads, read_bandwidth

__all__ = ["Plan", "PlanOptions", "PrecisionPlan", "plan"]

_CONTEXTS = (1024, 8192)
"""Tokens that are planned for unless others are asked for, beside the limit."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan is asked for beside the model."""

    precisions: tuple[str, ...] | None = None
    """Formats of the weights; None for all, where that of a quantised checkpoint is what a build
    makes that is asked for none."""
    compute_dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Of activations and caches: fp32 runs on the CPU, fp16 and bf16 on a GPU."""
    max_context: int | None = None
    """As of a build; None for max_position_embeddings."""
    contexts: tuple[int, ...] | None = None
    """Tokens of a row; None for some up to the limit."""
    batches: tuple[int, ...] = (1,)
    """Rows at the same time."""
    block_size: int | None = None
    """As of a build, for the precisions that are quantised."""
    quantizer: Method | None = None
    """As of a build, for the precisions that are quantised."""
    calibration: Path | None = None
    """Text that guides "gptq"."""
    keep: tuple[str, ...] = ()
    """As of a build, for the precisions that are quantised."""
    threads: int | None = None
    """Threads that read memory while its bandwidth is measured; None for one per CPU."""

    def __post_init__(self) -> None:
        for name, entries, known in (
            ("--precision", self.precisions or (), PRECISIONS),
            ("--compute-dtype", self.compute_dtypes, tuple(COMPUTE_BYTES)),
        ):
            for entry in entries:
                if entry not in known:
                    raise OptionError(f"{name} must be one of {', '.join(known)}, got {entry!r}")
        for option, values in (
            ("--max-context", () if self.max_context is None else (self.max_context,)),
            ("--context", self.contexts or ()),
            ("--batch", self.batches),
        ):
            for number in values:
                if type(number) is not int or number < 1:  # True is an int
                    raise OptionError(f"{option} must be an integer >= 1, got {number!r}")
        for option, given in (
            ("--precision", self.precisions or ()),
            ("--compute-dtype", self.compute_dtypes),
            ("--context", self.contexts or ()),
            ("--batch", self.batches),
        ):
            for value in given:
                if given.count(value) > 1:
                    raise OptionError(f"{option} {value} must be given once; leave the second out")
        for precision in self.planned:
            self.of_build(precision)

    @property
    def planned(self) -> tuple[str, ...]:
        """The precisions, in their order."""
        return PRECISIONS if self.precisions is None else self.precisions

    def of_build(self, precision: str, *, native: bool = False) -> BuildOptions:
        """The options of the build that is planned at a precision.

        Args:
            precision: One of ``planned``.
            native: Whether it is the checkpoint's own, taken because none was asked for.

        Raises:
            OptionError: If they exclude each other.
        """
        # Beside others, fp32 is planned without what is meant for them.
        quantized = precision != "fp32" or self.planned == ("fp32",)
        return BuildOptions(
            None if native else precision,
            max_context=self.max_context,
            block_size=self.block_size if quantized else None,
            quantizer=self.quantizer if quantized else None,
            calibration=self.calibration if quantized else None,
            keep=self.keep if quantized else (),
        )


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """One format of the weights."""

    precision: str
    refusal: str | None
    """Why this format cannot be built; the rest is empty then."""
    disk: DiskSize | None = None
    build_peak: int = 0
    """Peak resident bytes of a build with ``--no-verify``."""
    verified_build_peak: int = 0
    """The same with verification."""
    packed_cache: int = 0
    """Bytes that the first run on a CPU leaves in the user's cache folder; 0 where it packs its
    weights in memory."""
    lowered: bool = False
    """Whether a CPU runs a graph of its own, in lowered/cpu, instead of the portable one."""
    memory: tuple[RunMemory, ...] = ()
    speed: tuple[Speed, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model is and what it will cost."""

    model: str
    revision: str | None
    refusal: str | None
    """Why it cannot be built; ``precisions`` is empty then."""
    num_parameters: int
    parameters_by_part: dict[str, int]
    checkpoint_bytes: int
    """Of the weights files' tensors."""
    max_context: int | None
    bandwidth: float | None
    """Bytes per second that this machine reads; None where nothing runs on its CPU."""
    threads: int
    settings: tuple[Setting, ...]
    precisions: tuple[PrecisionPlan, ...]


def plan(
    model: str | Path, options: PlanOptions | None = None, *, revision: str | None = None
) -> Plan:
    """Say what a model will cost, without building it or fetching its weights.

    Args:
        model: A checkpoint's folder or hub id.
        options: Precisions, contexts and batches.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: If there is no such model, it cannot be fetched, or its config.json or a
            header is damaged.
        ExportError: If an option cannot hold for this model.
    """
    options = options or PlanOptions()
    with open_source(model, revision=revision) as source:
        counts = parameter_counts(source)
        limit, refusal = _limit(source, options)
        bandwidth = None
        precisions: tuple[PrecisionPlan, ...] = ()
        if limit is not None and source.config is not None:
            contexts = _contexts(options, limit)
            if "fp32" in options.compute_dtypes:
                bandwidth = read_bandwidth(options.threads)
            precisions = tuple(
                _precision(source, source.config, name, limit, contexts, options, bandwidth)
                for name in options.planned
            )
        return Plan(
            model=source.name,
            revision=source.revision,
            refusal=refusal,
            num_parameters=sum(counts.values()),
            parameters_by_part=counts,
            checkpoint_bytes=sum(tensor.num_bytes for tensor in source.stored),
            max_context=limit,
            bandwidth=bandwidth,
            threads=options.threads or available_threads(),
            settings=tuple(settings(source)),
            precisions=precisions,
        )


def _limit(source: Source, options: PlanOptions) -> tuple[int | None, str | None]:
    """The bundle's limit, or why there is no bundle."""
    if source.checkpoint is None:
        return None, source.refusal
    return context_limit(source.checkpoint.config, options.max_context), None


def _contexts(options: PlanOptions, limit: int) -> tuple[int, ...]:
    if options.contexts is None:
        return (*(context for context in _CONTEXTS if context < limit), limit)
    for context in options.contexts:
        if context > limit:
            raise ExportError(
                f"--context must be at most {limit}, the bundle's limit, got {context}; give a "
                "larger --max-context with it"
            )
    return options.contexts


def _precision(
    source: Source,
    config: ModelConfig,
    precision: str,
    limit: int,
    contexts: Sequence[int],
    options: PlanOptions,
    bandwidth: float | None,
) -> PrecisionPlan:
    if source.checkpoint is None or source.tying is None:
        raise AssertionError("a refused model has no precisions")
    checkpoint = source.checkpoint
    try:
        exact_bits = checkpoint.exact_bits(read=False)
        native = options.precisions is None and precision == native_precision(exact_bits.values())
        wanted = options.of_build(precision, native=native)
        recipe = wanted.recipe(precision)
        # Sources are listed and not read, so that nothing is quantised: any method will do.
        quantizer = None
        if recipe is not None:
            quantizer = BlockwiseQuantizer(replace(recipe.linears, method="search"))
        calibration = calibration_bytes(source, wanted.calibration)
        sources = tensor_sources(checkpoint, source.tying, limit, recipe, quantizer, exact_bits)
        plain = tensor_sources(checkpoint, source.tying, limit)
    except ExportError as error:
        return PrecisionPlan(precision, source.named(str(error)))
    stored, layers = stored_bytes(sources), config.num_hidden_layers
    layouts = {
        dtype: Layout.of(stored, tied=source.tying.tied, compute_bytes=COMPUTE_BYTES[dtype])
        for dtype in {"fp32", *options.compute_dtypes}
    }
    in_fp32 = Layout.of(stored_bytes(plain), tied=source.tying.tied)
    peak = build_peak(source, sources, num_layers=layers, calibration=calibration)
    lowered = is_lowered(config, quantized=recipe is not None)
    disk = disk_size(source, sources, num_layers=layers, lowered=lowered)
    packed_cache = packed_cache_bytes(
        stored, disk.weights, tied=source.tying.tied, lowered=lowered
    )
    return PrecisionPlan(
        precision,
        None,
        disk=disk,
        build_peak=peak,
        verified_build_peak=max(peak, verify_peak(config, in_fp32, precision=precision)),
        packed_cache=packed_cache,
        lowered=lowered,
        memory=tuple(
            run_memory(
                config,
                layouts[dtype],
                context=context,
                batch=batch,
                limit=limit,
                compute_dtype=dtype,
                packed_cache=packed_cache > 0,
                lowered=lowered,
            )
            for dtype in options.compute_dtypes
            for batch in options.batches
            for context in contexts
        ),
        speed=_speeds(
            config, layouts["fp32"], precision, limit, contexts, bandwidth, lowered=lowered
        ),
    )


def _speeds(
    config: ModelConfig,
    layout: Layout,
    precision: str,
    limit: int,
    contexts: Sequence[int],
    bandwidth: float | None,
    *,
    lowered: bool,
) -> tuple[Speed, ...]:
    if bandwidth is None:
        return ()
    return tuple(
        expected_speed(
            config,
            layout.streamed,
            # The portable graph's attention costs by a cache's capacity.
            kv_bytes(config, context=context, batch=1, limit=context if lowered else limit),
            precision=precision,
            context=context,
            bandwidth=bandwidth,
            lowered=lowered,
        )
        for context in contexts
    )
