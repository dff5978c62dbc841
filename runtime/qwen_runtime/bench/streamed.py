"""How many bytes one decode step has to read."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_runtime.bench.graph_file import ExternalTensor, read_external_tensors
from qwen_runtime.bundle import Bundle

__all__ = ["StreamedBytes"]

_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized", "RotaryEmbedding"})
"""Operators that read a row per token: of an embedding, of the rotary tables."""
_BYTES_OF_TYPE = {1: 4, 10: 2, 16: 2}
"""Bytes of ONNX's element types that a weight is cast to: float, float16, bfloat16."""
_BYTES_OF_CACHE = {"float": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class StreamedBytes:
    """What a decode step reads at least, in bytes."""

    weights: int
    """Of the weights, once for all rows."""
    cache_per_token: int
    """Of keys and values, for every token in every row's cache."""

    @classmethod
    def of(cls, bundle: Bundle) -> StreamedBytes:
        """Work it out from the decode graph and the manifest.

        A table of which only rows are looked up is left out: the rotary tables, and an embedding
        unless logits come from it too. A weight that is cast counts as what it is cast to, for an
        engine casts it once, when it loads; any other as it is stored. Two views of the same bytes
        of the file count once. A graph for the CPU is made of the same tensors and reads as much.

        Raises:
            BundleError: If the graph cannot be read.
        """
        entry = bundle.manifest.graphs["decode"]
        tensors = read_external_tensors(bundle.file(entry.file))
        streamed = {tensor.offset: _loaded(tensor) for tensor in tensors if _is_streamed(tensor)}
        caches = [item for item in entry.inputs if item.name.startswith("past_key_values.")]
        model = bundle.manifest.model
        per_head = model.num_key_value_heads * model.head_dim
        cache = sum(per_head * _BYTES_OF_CACHE[item.dtype] for item in caches)
        return cls(sum(streamed.values()), cache)

    def step(self, batch: int, length: float) -> float:
        """Bytes of one step.

        Args:
            batch: Rows.
            length: Tokens in each row's cache; a mean over steps may be a fraction.
        """
        return self.weights + batch * length * self.cache_per_token


def _is_streamed(tensor: ExternalTensor) -> bool:
    return not tensor.readers <= _LOOKUPS


def _loaded(tensor: ExternalTensor) -> int:
    if tensor.cast_to in _BYTES_OF_TYPE:
        return tensor.size * _BYTES_OF_TYPE[tensor.cast_to]
    return tensor.num_bytes
