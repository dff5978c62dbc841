"""TensorRT engines from a bundle's graph, with the real parser and builder and without a GPU.

    bundle graph ── fix_capacity, retype ── parse ── inspect ── build ── plan

Every function takes the TensorRT module as ``trt``. ``tensorrt_rtx_bindings`` 1.7 is what it runs
with; enterprise ``tensorrt`` 11 has the same classes but for what `flavours` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.errors import TargetError
from qwen_export.passes.retype import COMPUTE_DTYPES, fix_capacity, retype
from qwen_export.passes.tables import dequantize_tables
from qwen_export.progress import Progress, no_progress
from qwen_export.targets.flavours import ALL_SMS, set_sms
from qwen_export.targets.messages import Messages, new_logger
from qwen_export.targets.monitor import PERCENT, Phases, new_monitor, run_cancellable
from qwen_export.targets.network import NetworkFacts, inspect_network
from qwen_export.targets.plan import Plan, PlanHeader
from qwen_export.targets.profiles import Profile, check_profiles, profile_shapes
from qwen_runtime.bundle import Bundle

__all__ = ["ParsedGraph", "build_plan", "engine_graph", "serialize"]

MAX_WEIGHT_RATIO = 1.02
"""Weights in the plan against weights in the graph: padding is below this, a second copy above."""
TENSOR_PADDING = 512
"""Bytes by which each tensor may be padded beside that, which shows in models of a few kB."""

_NOT_ON_SM75 = {
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT4: "int4",
}
"""Types that the oldest generation has no instructions for."""
_Buffer = npt.NDArray[np.generic]


def engine_graph(
    bundle: Bundle, phase: Literal["prefill", "decode"], *, dtype: str, capacity: int
) -> ir.Model:
    """A bundle's graph as an engine wants it: 16-bit, with caches of a fixed capacity.

    Args:
        bundle: Gives the graph and its weights; not changed, and read when the graph is parsed.
        phase: "prefill", which also decodes, or "decode".
        dtype: "bf16" or "fp16".
        capacity: Slots of every cache row, in tokens.

    Raises:
        TargetError: If the type is not offered or the capacity is out of range.
    """
    if dtype not in COMPUTE_DTYPES:
        raise TargetError(
            f"an engine computes in {' or '.join(COMPUTE_DTYPES)}, got {dtype}: TensorRT has no "
            "float32 attention kernel",
            names=[dtype],
        )
    graph = ir.load(bundle.file(bundle.manifest.graphs[phase].file))
    fix_capacity(graph, capacity)
    dequantize_tables(graph)
    retype(graph, COMPUTE_DTYPES[dtype])
    return graph


def build_plan(
    trt: ModuleType,
    graph: ir.Model,
    profiles: Sequence[Profile],
    *,
    num_hidden_layers: int,
    sms: Sequence[int] = ALL_SMS,
    progress: Progress = no_progress,
) -> Plan:
    """Check the profiles, parse, look at the network, and build the engine.

    Args:
        trt: The TensorRT module.
        graph: From `engine_graph`.
        profiles: One or two; a second one costs kernels, not weights.
        num_hidden_layers: Attention layers the graph has.
        sms: GPU generations to build for; none for TensorRT's own choice.
        progress: Where to report the two long steps.

    Raises:
        TargetError: If any of these refuses, with the names at fault.
    """
    check_profiles(profiles, graph.graph)
    _refuse_types(graph.graph, sms)
    parsed = ParsedGraph(trt, graph, progress=progress)
    facts = inspect_network(trt, parsed.network, num_hidden_layers=num_hidden_layers)
    return parsed.build(profiles, facts, sms=sms, progress=progress)


class ParsedGraph:
    """TensorRT's network of a graph, with the weights it refers to.

    Attributes:
        network: The ``INetworkDefinition``.
        weight_bytes: Size of the graph's initializers.

    Args:
        trt: The TensorRT module.
        graph: From `engine_graph`. Not modified; its weights are cast one after the other.
        progress: Where to report the weights handed over.

    Raises:
        TargetError: If TensorRT's parser refuses the graph; names the nodes.
    """

    def __init__(
        self, trt: ModuleType, graph: ir.Model, *, progress: Progress = no_progress
    ) -> None:
        self._trt: Any = trt
        self._said = Messages()
        self._inputs = list(graph.graph.inputs)
        # The network points into these until the plan is built.
        self._buffers: list[_Buffer] = []
        logger = new_logger(trt, self._said)
        self._builder = self._trt.Builder(logger)
        # Never an IErrorRecorder: attached to a builder or a network it crashes the process.
        self.network = self._builder.create_network(0)
        self._parser = self._trt.OnnxParser(self.network, logger)
        self._parse(graph, progress)
        self.weight_bytes = sum(buffer.nbytes for buffer in self._buffers)

    def _parse(self, graph: ir.Model, progress: Progress) -> None:
        model, weights = serialize(graph)
        if not self._parser.load_model_proto(model):
            raise self._parser_error()
        total = sum(tensor.nbytes for tensor in weights.values())
        with progress("Casting weights", total, unit="B") as advance:
            for name, tensor in weights.items():
                buffer = _buffer(name, tensor)
                self._buffers.append(buffer)
                if not self._parser.load_initializer(name, buffer.ctypes.data, buffer.nbytes):
                    raise self._error(f"refuses the data of {name}", [name])
                advance(buffer.nbytes)
        if not self._parser.parse_model_proto():
            raise self._parser_error()

    def build(
        self,
        profiles: Sequence[Profile],
        facts: NetworkFacts,
        *,
        sms: Sequence[int] = ALL_SMS,
        progress: Progress = no_progress,
    ) -> Plan:
        """Build the engine, once.

        An exception that reaches the caller while it waits, such as Ctrl-C, stops the build.

        Args:
            profiles: Profiles that `check_profiles` accepted.
            facts: What `inspect_network` found.
            sms: GPU generations to build for; none for TensorRT's own choice.
            progress: Where to report how far it is.

        Raises:
            TargetError: If the builder fails, warns of something that makes numbers wrong, or
                stores weights twice.
        """
        config = self._builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        if hasattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT-RTX captures a decode step in a CUDA graph only if it allocates nothing.
            config.set_flag(self._trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        self._set_sms(config, sms)
        for profile in profiles:
            self._add_profile(config, profile)
        with progress("Building the engine", PERCENT, unit="%") as advance:
            phases = Phases(advance)
            # A name of its own: the configuration refers to it without keeping it alive.
            monitor = new_monitor(self._trt, phases)
            config.progress_monitor = monitor
            memory = run_cancellable(
                lambda: self._builder.build_serialized_network(self.network, config),
                phases.cancelled,
            )
        if memory is None:
            raise self._error("cannot build the engine")
        if fatal := self._said.fatal_warnings:
            raise TargetError(
                f"the engine would give wrong numbers, TensorRT warns: {fatal[0]}", names=fatal
            )
        # By itself it calls its bytes floats of one byte.
        data = np.frombuffer(memory, np.uint8).data
        header = PlanHeader.read(data) if hasattr(self._trt, "ComputeCapability") else None
        weight_bytes = header.weight_bytes if header else self._said.weight_bytes
        _require_weights_once(weight_bytes, self.weight_bytes, len(self._buffers))
        return Plan(
            data=data,
            header=header,
            weight_bytes=weight_bytes,
            network=facts,
            graph_weight_bytes=self.weight_bytes,
            activation_bytes=tuple(self._said.activation_bytes),
            kernels=tuple(self._said.kernels),
            warnings=tuple(self._said.warnings),
        )

    def _add_profile(self, config: Any, profile: Profile) -> None:
        shapes = self._builder.create_optimization_profile()
        for name, (smallest, optimal, largest) in profile_shapes(profile, self._inputs).items():
            shapes.set_shape(name, smallest, optimal, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise self._error(f"refuses the profile {profile.name!r}", [profile.name])

    def _set_sms(self, config: Any, sms: Sequence[int]) -> None:
        refused = set_sms(self._trt, config, sms)
        if refused is not None:
            raise self._error(f"refuses {refused}", [refused])

    def _parser_error(self) -> TargetError:
        errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
        nodes = [error.node_name() for error in errors]
        first = errors[0].desc().splitlines()[0] if errors else "no reason given"
        at = f"{errors[0].node_operator()} {nodes[0]}" if errors else "the graph"
        return TargetError(f"TensorRT cannot read {at}: {first}", names=nodes)

    def _error(self, what: str, names: Sequence[str] = ()) -> TargetError:
        reason = "; ".join(self._said.errors) or "no reason given"
        return TargetError(f"TensorRT {what}: {reason}", names=names)


def _refuse_types(graph: ir.Graph, sms: Sequence[int]) -> None:
    used = {value.dtype for value in (*graph.inputs, *graph.initializers.values())}
    for dtype, name in _NOT_ON_SM75.items():
        if 75 in sms and dtype in used:
            raise TargetError(f"{name} needs SM 80 or newer, got 75", names=["75"])


def serialize(graph: ir.Model) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """A graph without its weights as ONNX writes it, and the weights, still unread.

    Small constants of the graph itself stay in it.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    values = graph.graph.initializers
    try:
        for name, value in values.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                weights[name] = tensor
                value.const_value = ir.ExternalTensor(
                    "handed-over", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
                )
        return ir.to_proto(graph).SerializeToString(), weights
    finally:
        for name, tensor in weights.items():
            values[name].const_value = tensor


def _buffer(name: str, tensor: ir.TensorProtocol) -> _Buffer:
    """The tensor's bytes as ONNX stores them, in memory of their own or mapped."""
    try:
        if tensor.dtype.bitwidth % 8:
            return np.frombuffer(tensor.tobytes(), np.uint8)
        return np.ascontiguousarray(tensor.numpy())
    except (OSError, ValueError) as error:
        # A weights file that is a link, for one, is not read.
        raise TargetError(f"{name} cannot be read: {error}", names=[name]) from error


def _require_weights_once(in_plan: int | None, in_graph: int, num_tensors: int) -> None:
    if in_plan is None:
        raise TargetError(
            "the engine must hold every weight once, but neither its header nor TensorRT's "
            "messages say what it holds"
        )
    if in_plan > MAX_WEIGHT_RATIO * in_graph + TENSOR_PADDING * num_tensors:
        raise TargetError(
            f"the engine must hold every weight once, {in_graph:,} bytes, but holds {in_plan:,}; "
            "widen the profiles: a batch pinned to 1 makes TensorRT store weights twice"
        )
