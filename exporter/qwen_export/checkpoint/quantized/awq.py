"""AWQ checkpoints in the GEMM layout: everything packed along the outputs, interleaved.

Shape letters: K inputs, N outputs, G groups of inputs.

    qweight [K, N / 8] int32    word j of a row: outputs 8 j + (0, 2, 4, 6, 1, 3, 5, 7), lowest
                                four bits first
    qzeros  [G, N / 8] int32    the same
    scales  [G, N]     float

Source:
    AutoAWQ ``WQLinear_GEMM.from_linear`` (gemm.py) and ``dequantize_gemm`` (packing_utils.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.method import (
    Exceptions,
    divided,
    group_size_of,
    module_of,
    refused,
)
from qwen_export.checkpoint.quantized.parts import StoredTensors
from qwen_export.checkpoint.quantized.weight import (
    WORD_BITS,
    FloatArray,
    IntegerWeight,
    ShortArray,
    unpack_words,
)
from qwen_export.errors import CheckpointError

__all__ = ["AwqMethod", "AwqWeight"]

_BITS = 4
_PER_WORD = WORD_BITS // _BITS
_MIDDLE = 1 << (_BITS - 1)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its word's outputs each field holds, lowest bits first."""
_BOOKKEEPING = (
    "backend",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "quant_method",
)


@dataclass(frozen=True, slots=True)
class AwqWeight(IntegerWeight):
    """A weight in AWQ's GEMM layout; parts are qweight, scales and qzeros."""

    def codes(self, outputs: slice) -> npt.NDArray[np.integer]:
        """Codes of some outputs, from 0, [K, n]."""
        words = slice(outputs.start // _PER_WORD, outputs.stop // _PER_WORD)
        return unpack_words(self.parts[0].read()[:, words], _BITS, _ORDER)

    def zero_points(self) -> ShortArray:
        """The codes that stand for 0, [G, N]."""
        return unpack_words(self.parts[2].read(), _BITS, _ORDER).astype(np.int16)

    def scales(self) -> FloatArray:
        """[G, N]."""
        return self.parts[1].read().astype(np.float32)


@dataclass(frozen=True, slots=True)
class AwqMethod:
    """quant_method "awq"."""

    group_size: int | None
    """Inputs that share a scale and a zero point; None for all."""
    zero_point: bool
    """False: every zero point is 8."""
    exceptions: Exceptions
    warnings: tuple[str, ...] = ()

    KEYS = (
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "version",
        "format",
        "checkpoint_format",
        "zero_point",
        "modules_to_not_convert",
        *_BOOKKEEPING,
    )
    """The keys of quantization_config that are known."""

    @classmethod
    def read(cls, values: ConfigValues) -> AwqMethod:
        """Read quantization_config.

        Raises:
            UnsupportedModelError: If it asks for other bits or another layout than GEMM.
            CheckpointError: If a value has the wrong type.
        """
        bits_key = "w_bit" if "w_bit" in values.raw else "bits"
        bits = values.integer(bits_key, _BITS)
        if bits != _BITS:
            raise refused(values, bits_key, bits, [_BITS])
        # "version" is AutoAWQ's spelling, the others are transformers' and GPTQModel's.
        spellings = ("version", "format", "checkpoint_format")
        key = next((each for each in spellings if values.raw.get(each)), "version")
        version = values.text(key, "gemm")
        if version.lower() != "gemm":
            raise refused(values, key, version, ["'gemm'"])
        if values.raw.get("backend") == "llm-awq":
            raise refused(values, "backend", "llm-awq", ["the GEMM layout of AutoAWQ"])
        if "q_group_size" in values.raw:
            values = replace(values, raw={**values.raw, "group_size": values.raw["q_group_size"]})
        return cls(
            group_size=group_size_of(values, 128),
            zero_point=values.boolean("zero_point", True),
            exceptions=Exceptions.read(values, "modules_to_not_convert"),
        )

    def weight(self, name: str, shape: tuple[int, int], stored: StoredTensors) -> AwqWeight | None:
        """Find how a weight is stored; see `Method.weight`."""
        module, (num_outputs, num_inputs) = module_of(name), shape
        if stored.find(f"{module}.qweight") is None:
            return None
        size = divided(name, num_inputs, self.group_size)
        if num_outputs % _PER_WORD:
            raise CheckpointError(
                f"{name} [{num_outputs}, {num_inputs}] cannot be packed as AWQ: its outputs must "
                f"be a multiple of {_PER_WORD}",
                path=stored.folder,
            )
        groups, packed = num_inputs // size, num_outputs // _PER_WORD
        parts = (
            stored.require(
                f"{module}.qweight", ("int32",), {(num_inputs, packed): "(inputs, outputs/8)"}
            ),
            stored.require_scales(
                f"{module}.scales", {(groups, num_outputs): "(groups, outputs)"}
            ),
            stored.require(
                f"{module}.qzeros", ("int32",), {(groups, packed): "(groups, outputs/8)"}
            ),
        )
        weight = AwqWeight(name, shape, parts, _BITS, size, symmetric=False)
        self.exceptions.check(weight)
        if stored.hollow:
            return replace(weight, symmetric=not self.zero_point)
        symmetric = bool((weight.zero_points() == _MIDDLE).all())
        if not symmetric and not self.zero_point:
            raise CheckpointError(
                f"{parts[2].name} must hold the zero point {_MIDDLE} alone, because "
                "quantization_config.zero_point is false; one of the two files is wrong",
                path=parts[2].info.file,
            )
        parts[2].release()
        return replace(weight, symmetric=symmetric)
