"""Where the reference's weights come from: a checkpoint, or what a bundle made of one.

Shape letters: K inputs of a weight, N its outputs, V vocab_size, E hidden_size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.checkpoint import Checkpoint, ModelConfig, Tying, expected_tensors
from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.model.parameters import parameters
from qwen_export.weights import BlockFormat, codes_of_bytes, scale_name
from qwen_runtime.backends.base import IntArray
from qwen_runtime.bundle import Bundle

__all__ = ["BundleWeights", "CheckpointWeights", "ReferenceWeights"]

Array = npt.NDArray[Any]


class ReferenceWeights(Protocol):
    """Weights under the checkpoint's names and in its shapes; linear layers are [N, K]."""

    @property
    def config(self) -> ModelConfig:
        """Of the checkpoint."""

    @property
    def path(self) -> Path:
        """Folder of the checkpoint, whose config.json transformers reads."""

    @property
    def names(self) -> list[str]:
        """Every tensor the model needs."""

    @property
    def tying(self) -> Tying:
        """Which tables serve as embedding and output projection."""

    def read(self, name: str) -> Array:
        """A whole tensor."""

    def rows(self, name: str, which: slice | IntArray) -> Array:
        """Some rows of a tensor: of a table [V, E], of a linear layer's weight, of a vector."""

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory."""


class CheckpointWeights:
    """A checkpoint's own weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.config = checkpoint.config
        self.path = checkpoint.path
        self.tying = checkpoint.resolve_tying()
        self.names = list(expected_tensors(checkpoint.config))

    def read(self, name: str) -> Array:
        """See `ReferenceWeights.read`."""
        return self._checkpoint.read(name)

    def rows(self, name: str, which: slice | IntArray) -> Array:
        """See `ReferenceWeights.rows`."""
        return self._checkpoint.read_rows(name, which)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as the checkpoint has it."""
        return self._checkpoint.tensors[name].shape

    def release(self, name: str) -> None:
        """See `ReferenceWeights.release`."""
        self._checkpoint.release(name)


class BundleWeights:
    """What a bundle's weights file stands for: quantised weights as codes times scales, in fp32.

    Offsets and types are those of prefill.onnx, so that a wrong one shows.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint it was built from; gives names, shapes and the config.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.path = checkpoint.path
        tying = checkpoint.resolve_tying()
        self.names = list(expected_tensors(checkpoint.config))
        graph = ir.load(bundle.file(bundle.manifest.graphs["prefill"].file)).graph
        self._tensors = {
            name: codes_of_bytes(value.const_value)
            for name, value in graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        # The graphs know the tables under these names, whatever the checkpoint calls them; only a
        # quantised table that is tied has both.
        head = LM_HEAD_NAME if LM_HEAD_NAME in self._tensors else EMBEDDING_NAME
        self.tying = Tying(tying.tied, EMBEDDING_NAME, head)
        wanted = parameters(
            checkpoint.config, tied=tying.tied, max_context=bundle.manifest.max_context
        )
        # Stored [K, N]: all linear layers, and a quantised table that is also the projection.
        self._turned = {parameter.name for parameter in wanted if parameter.transposed}
        if tying.tied:
            tables = {self.tying.embedding, self.tying.lm_head}
            self._turned |= {name for name in tables if scale_name(name) in self._tensors}
        self._file = bundle.file(bundle.manifest.weights.file)

    def __contains__(self, name: str) -> bool:
        """Whether the bundle has a tensor of this name."""
        return name in self._tensors

    def format_of(self, name: str) -> BlockFormat | None:
        """How a weight is quantised, None for floats; its axis is that of the inputs as stored."""
        if scale_name(name) not in self._tensors:
            return None
        axis: Literal[0, 1] = 0 if name in self._turned else 1
        codes, scales = self._tensors[name], self._tensors[scale_name(name)]
        block_size = codes.shape.numpy()[axis] // scales.shape.numpy()[axis]
        return BlockFormat(codes.dtype.bitwidth, block_size, axis)

    def read(self, name: str) -> Array:
        """See `ReferenceWeights.read`."""
        return self.rows(name, slice(None))

    def rows(self, name: str, which: slice | IntArray) -> Array:
        """See `ReferenceWeights.rows`."""
        if len(self._tensors[name].shape) == 1:
            return self._map(name)[which]
        turned = name in self._turned
        codes = self._codes(name, which)
        if scale_name(name) not in self._tensors:
            return codes
        scales = self._map(scale_name(name))
        scales = scales[:, which].T if turned else scales[which]
        width = codes.shape[1] // scales.shape[1]
        blocks = codes.reshape(*scales.shape, width).astype(np.float32)
        blocks *= scales[:, :, None]
        values: Array = blocks.reshape(codes.shape)
        return values

    def release(self, name: str) -> None:
        """See `ReferenceWeights.release`; every read maps the file anew."""

    def _codes(self, name: str, which: slice | IntArray) -> Array:
        """Rows [n, K] of a stored tensor as numbers, scales not applied."""
        turned = name in self._turned
        stored = self._map(name)
        if self._tensors[name].dtype != ir.DataType.INT4:
            return np.ascontiguousarray(stored[:, which].T if turned else stored[which])
        first, second = self._tensors[name].shape.numpy()
        if second % 2:
            # Rows begin within a byte: there is no part of the file that holds some of them.
            whole = _unpack_int4(stored)[: first * second].reshape(first, second)
            return np.ascontiguousarray(whole[:, which].T if turned else whole[which])
        packed = stored.reshape(first, second // 2)
        if not turned:
            return _unpack_int4(packed[which])
        if isinstance(which, slice) and which.step in (None, 1):
            start, stop, _ = which.indices(second)
            codes = _unpack_int4(packed[:, start // 2 : (stop + 1) // 2])
            codes = codes[:, start % 2 : start % 2 + stop - start]
        else:
            codes = _unpack_int4(packed)[:, which]
        return np.ascontiguousarray(codes.T)

    def _map(self, name: str) -> Array:
        """A stored tensor, mapped; INT4 as packed bytes, [ceil(n / 2)]."""
        tensor = self._tensors[name]
        shape = tensor.shape.numpy()
        if tensor.dtype == ir.DataType.INT4:
            return np.memmap(self._file, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
        dtype = tensor.dtype.numpy()
        return np.memmap(self._file, dtype, "r", tensor.offset or 0, tuple(shape))


def _unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Codes of packed bytes, the first of a byte in its low half, [..., m] to [..., 2m]."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    # Shifts of signed bytes keep the sign.
    np.right_shift((packed << np.uint8(4)).view(np.int8), 4, out=codes[..., 0::2])
    np.right_shift(np.ascontiguousarray(packed).view(np.int8), 4, out=codes[..., 1::2])
    return codes
