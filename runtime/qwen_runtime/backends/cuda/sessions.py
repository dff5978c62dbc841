"""Sessions on a bundle's lowered graphs: opened on the device, their inputs and outputs checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_runtime.backends.cuda.seam import CudaSeam
from qwen_runtime.backends.cuda.weights import DeviceWeights
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.lowered_description import GraphName
from qwen_runtime.lowered_file import LoweredFolder
from qwen_runtime.manifest import GraphEntry

__all__ = ["CACHE_TYPES", "LoweredGraph"]

CACHE_TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
"""Compute dtype to the element type of caches."""
_INPUTS = {
    "input_ids": "int64",
    "past_lengths": "int64",
    "logits_indices": "int64",
    "total_sequence_length": "int32",
}
_OUTPUTS = {"logits": "float", "next_tokens": "int64"}
_TOP_OUTPUTS = {"top_logits": "float", "top_tokens": "int64"}
_OPTIONAL = {"logits_indices", "total_sequence_length", "next_tokens"}
_FALLBACK = "fallback to CPU EP has been explicitly disabled"
"""ONNX Runtime's words where a node has no kernel on the device."""
_CPU = "CPUExecutionProvider"


class LoweredGraph:
    """One of a bundle's lowered graphs in a session.

    Attributes:
        session: The onnxruntime.InferenceSession.
        entry: The graph's inputs and outputs.

    Args:
        seam: CUDA and ONNX Runtime.
        bundle: The bundle.
        folder: Its lowered graphs.
        name: Which of them.
        weights: Its initialisers, which stay on the device until the session is gone.
        stream: The stream of all its work.

    Raises:
        BackendError: If ONNX Runtime cannot load it, or a node would run on the CPU; it names it.
        BundleError: If it has inputs or outputs that this runtime does not know.
    """

    def __init__(
        self,
        seam: CudaSeam,
        bundle: Bundle,
        folder: LoweredFolder,
        name: GraphName,
        weights: DeviceWeights,
        stream: int,
    ) -> None:
        self._folder, self._path = folder, folder.graph_file(name)
        self.entry: GraphEntry = folder.description.graphs[name]
        if name == "top_logits":
            self._check_top(bundle.manifest.model.vocab_size)
        else:
            self._check_tensors(bundle)
        self._seam, self._weights = seam, weights
        self._providers = seam.providers(
            stream,
            capture=name == "decode",
            # Parity in float32 is about 24 bits of mantissa.
            tf32=folder.description.compute_dtype != "fp32",
        )
        self._bundle_path = bundle.path
        self.session: Any = self._open()

    def has(self, name: str) -> bool:
        """Whether the graph has an input or output of that name."""
        return any(each.name == name for each in (*self.entry.inputs, *self.entry.outputs))

    @property
    def num_top(self) -> int:
        """How many of a row's highest logits the graph ``top_logits`` finds."""
        return int(self.entry.outputs[0].shape[-1])

    def close(self) -> None:
        """Let go of the session."""
        self.session = None

    def _open(self) -> Any:
        try:
            return self._session(self._seam.session_options())
        except Exception as error:
            if _FALLBACK in str(error):
                names = ", ".join(self._on_cpu()) or "a node"
                raise BackendError(
                    f"every node of {self._path} must run on the GPU, but {names} would run on the "
                    f"CPU; make the graphs again: {self._folder.remake_command}"
                ) from error
            raise BackendError(f"ONNX Runtime could not load {self._path}: {error}") from error

    def _session(self, options: Any) -> Any:
        options.log_severity_level = 4  # what is wrong is raised, and reported with its reason
        # Initialisers claim to lie in weights.bin, past its end: one that was not taken from here
        # is an error, and not read as something else.
        where = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(where, str(self._bundle_path))
        for name, value in self._weights.values.items():
            options.add_initializer(name, value)
        ort = self._seam.onnxruntime
        return ort.InferenceSession(str(self._path), options, providers=list(self._providers))

    def _on_cpu(self) -> list[str]:
        """Nodes that ONNX Runtime would give to the CPU, "name (operator)" each."""
        options = self._seam.session_options(allow_cpu=True)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = self._session(options)
        return [
            f"{node.name} ({node.op_type})"
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == _CPU
            for node in part.get_nodes()
        ]

    def _check_tensors(self, bundle: Bundle) -> None:
        cache = CACHE_TYPES[self._folder.description.compute_dtype]
        layers = range(bundle.manifest.model.num_hidden_layers)
        parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        pasts = {f"past_key_values.{part}": cache for part in parts}
        presents = {f"present.{part}": cache for part in parts}
        self._check_names({**_INPUTS, **pasts}, {**_OUTPUTS, **presents})

    def _check_top(self, vocab_size: int) -> None:
        self._check_names({"logits": "float"}, _TOP_OUTPUTS)
        counts = {tensor.shape[1:] for tensor in self.entry.outputs}
        sizes = [size for shape in counts for size in shape if isinstance(size, int)]
        if len(counts) != 1 or len(sizes) != 1 or not 0 < sizes[0] <= vocab_size:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in self.entry.outputs)
            raise self._unknown(f"outputs of {shapes}")

    def _check_names(self, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        for found, wanted in ((self.entry.inputs, inputs), (self.entry.outputs, outputs)):
            for tensor in found:
                if tensor.name not in wanted or tensor.dtype != wanted[tensor.name]:
                    raise self._unknown(f"{tensor.name} of type {tensor.dtype}")
            missing = {*wanted} - {tensor.name for tensor in found} - _OPTIONAL
            if missing:
                raise self._unknown(f"no {', '.join(sorted(missing))}")

    def _unknown(self, what: str) -> BundleError:
        return BundleError(
            f"{self._path}: the graph must have the inputs and outputs that docs/cuda.md lists, got "
            f"{what}; make it again: {self._folder.remake_command}",
            path=self._path,
        )
