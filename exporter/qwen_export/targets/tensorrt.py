"""TensorRT engines from a bundle's graph, with the real parser and builder and without a GPU.

    bundle graph ── fix_capacity, retype ── parse ── inspect ── build ── plan

Every function takes the TensorRT module as ``trt``. ``tensorrt_rtx_bindings`` 1.7 is what it runs
with; enterprise ``tensorrt`` 11 has the same classes but for the GPU list.
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
from qwen_export.targets.messages import Messages, new_logger
from qwen_export.targets.network import NetworkFacts, inspect_network
from qwen_export.targets.plan import Plan, PlanHeader
from qwen_export.targets.profiles import Profile, check_profiles, profile_shapes
from qwen_runtime.bundle import Bundle

__all__ = ["ALL_SMS", "ParsedGraph", "build_plan", "engine_graph"]

ALL_SMS = (80, 86, 89, 120, 121)
"""GPU generations one plan serves; more of them cost bytes, not time."""
MAX_WEIGHT_RATIO = 1.02
"""Weights in the plan against weights in the graph: padding is below this, a second copy above."""

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
    retype(graph, COMPUTE_DTYPES[dtype])
    return graph


def build_plan(
    trt: ModuleType,
    graph: ir.Model,
    profiles: Sequence[Profile],
    *,
    num_hidden_layers: int,
    sms: Sequence[int] = ALL_SMS,
) -> Plan:
    """Check the profiles, parse, look at the network, and build the engine.

    Args:
        trt: The TensorRT module.
        graph: From `engine_graph`.
        profiles: One or two; a second one costs kernels, not weights.
        num_hidden_layers: Attention layers the graph has.
        sms: GPU generations to build for; none for TensorRT's own choice.

    Raises:
        TargetError: If any of these refuses, with the names at fault.
    """
    check_profiles(profiles, graph.graph)
    parsed = ParsedGraph(trt, graph)
    facts = inspect_network(trt, parsed.network, num_hidden_layers=num_hidden_layers)
    return parsed.build(profiles, facts, sms=sms)


class ParsedGraph:
    """TensorRT's network of a graph, with the weights it refers to.

    Attributes:
        network: The ``INetworkDefinition``.
        weight_bytes: Size of the graph's initializers.

    Args:
        trt: The TensorRT module.
        graph: From `engine_graph`. Not modified; its weights are cast one after the other.

    Raises:
        TargetError: If TensorRT's parser refuses the graph; names the nodes.
    """

    def __init__(self, trt: ModuleType, graph: ir.Model) -> None:
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
        self._parse(graph)
        self.weight_bytes = sum(buffer.nbytes for buffer in self._buffers)

    def _parse(self, graph: ir.Model) -> None:
        model, weights = _without_weights(graph)
        if not self._parser.load_model_proto(model):
            raise self._parser_error()
        for name, tensor in weights.items():
            buffer = _buffer(tensor)
            self._buffers.append(buffer)
            if not self._parser.load_initializer(name, buffer.ctypes.data, buffer.nbytes):
                raise self._error(f"refuses the data of {name}", [name])
        if not self._parser.parse_model_proto():
            raise self._parser_error()

    def build(
        self, profiles: Sequence[Profile], facts: NetworkFacts, *, sms: Sequence[int] = ALL_SMS
    ) -> Plan:
        """Build the engine, once.

        Args:
            profiles: Profiles that `check_profiles` accepted.
            facts: What `inspect_network` found.
            sms: GPU generations to build for; none for TensorRT's own choice.

        Raises:
            TargetError: If the builder fails, warns of something that makes numbers wrong, or
                stores weights twice.
        """
        config = self._builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        self._set_sms(config, sms)
        for profile in profiles:
            self._add_profile(config, profile)
        memory = self._builder.build_serialized_network(self.network, config)
        if memory is None:
            raise self._error("cannot build the engine")
        if fatal := self._said.fatal_warnings:
            raise TargetError(
                f"the engine would give wrong numbers, TensorRT warns: {fatal[0]}", names=fatal
            )
        data = bytes(memory)
        header = PlanHeader.read(data)
        _require_weights_once(header.weight_bytes, self.weight_bytes)
        return Plan(
            data=data,
            header=header,
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
        if not sms:
            return
        if not hasattr(self._trt, "ComputeCapability"):
            raise TargetError(
                f"{self._trt.__name__} builds for the GPU at hand only, got SM "
                f"{', '.join(map(str, sms))}; TensorRT-RTX builds for others"
            )
        known = {name for name in dir(self._trt.ComputeCapability) if name.startswith("SM")}
        unknown = [str(sm) for sm in sms if f"SM{sm}" not in known]
        if unknown:
            raise TargetError(
                f"SM must be one of {', '.join(sorted(name[2:] for name in known))}, got "
                f"{', '.join(unknown)}",
                names=unknown,
            )
        if 75 in sms and any(each.dtype == ir.DataType.BFLOAT16 for each in self._inputs):
            raise TargetError("bf16 needs SM 80 or newer, got 75; build with fp16", names=["75"])
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            capability = getattr(self._trt.ComputeCapability, f"SM{sm}")
            if not config.set_compute_capability(capability, index):
                raise self._error(f"refuses SM {sm}", [str(sm)])

    def _parser_error(self) -> TargetError:
        errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
        nodes = [error.node_name() for error in errors]
        first = errors[0].desc().splitlines()[0] if errors else "no reason given"
        at = f"{errors[0].node_operator()} {nodes[0]}" if errors else "the graph"
        return TargetError(f"TensorRT cannot read {at}: {first}", names=nodes)

    def _error(self, what: str, names: Sequence[str] = ()) -> TargetError:
        reason = "; ".join(self._said.errors) or "no reason given"
        return TargetError(f"TensorRT {what}: {reason}", names=names)


def _without_weights(graph: ir.Model) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """The graph alone, serialised, and its weights, still unread.

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


def _buffer(tensor: ir.TensorProtocol) -> _Buffer:
    """The tensor's bytes as ONNX stores them, in memory of their own or mapped."""
    if tensor.dtype.bitwidth % 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy())


def _require_weights_once(in_plan: int, in_graph: int) -> None:
    if in_plan > MAX_WEIGHT_RATIO * in_graph:
        raise TargetError(
            f"the engine must hold every weight once, {in_graph:,} bytes, but holds {in_plan:,}; "
            "widen the profiles: a batch pinned to 1 makes TensorRT store weights twice"
        )
