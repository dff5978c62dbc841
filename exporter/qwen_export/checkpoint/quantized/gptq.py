"""GPTQ checkpoints: codes packed along the inputs, zero points packed along the outputs.

Shape letters: K inputs, N outputs, G groups of inputs, P codes in a 32-bit word.

    qweight [K / P, N] int32    word j of a column: inputs P j .. P j + P - 1, lowest bits first
    qzeros  [G, N / P] int32    word j of a row: outputs P j ..; version 1 stores zero point - 1
    scales  [G, N]     float
    g_idx   [K]        int32    the group of every input

Source:
    AutoGPTQ ``QuantLinear.pack`` and ``.forward`` (qlinear_cuda.py); GPTQModel
    ``convert_gptq_v1_to_v2_format_module``.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from qwen_export.checkpoint.quantized.parts import StoredTensors, require_group_order
from qwen_export.checkpoint.quantized.weight import (
    WORD_BITS,
    FloatArray,
    IntegerWeight,
    ShortArray,
    unpack_words,
)
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["GptqMethod", "GptqWeight"]

_BITS = (4, 8)
# What is added to a stored zero point, by checkpoint_format.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_OBEYED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format")
# Keys that must ask for nothing, and what is supported instead.
_REFUSED = {
    "dynamic": "one setting for all modules",
    "is_marlin_format": "the plain GPTQ layout",
    "rotation": "weights as the model has them",
    "adapter": "a model without adapters",
}
_BOOKKEEPING = (
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "exllama_config",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "pad_token_id",
    "parallel_packing",
    "quant_method",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)


@dataclass(frozen=True, slots=True)
class GptqWeight(IntegerWeight):
    """A weight in GPTQ's layout; parts are qweight, scales and qzeros."""

    zero_offset: int
    """Added to a stored zero point: 1 in version 1 of the format, 0 in version 2."""

    def codes(self, outputs: slice) -> npt.NDArray[np.integer]:
        """Codes of some outputs, from 0, [K, n]."""
        words = self.parts[0].read()[:, outputs]
        unpacked = unpack_words(words, self.bits).reshape(*words.shape, -1)
        return np.swapaxes(unpacked, 1, 2).reshape(self.shape[1], -1)

    def zero_points(self) -> ShortArray:
        """The codes that stand for 0, [G, N]."""
        stored = unpack_words(self.parts[2].read(), self.bits)
        return stored.astype(np.int16) + np.int16(self.zero_offset)

    def scales(self) -> FloatArray:
        """[G, N]."""
        return self.parts[1].read().astype(np.float32)


@dataclass(frozen=True, slots=True)
class GptqMethod:
    """quant_method "gptq"."""

    bits: int
    group_size: int | None
    """Inputs that share a scale; None for all."""
    symmetric: bool
    """sym: every zero point is the middle of the range."""
    activation_order: bool
    """desc_act: groups may be in activation order, unless g_idx says that they are not."""
    zero_offset: int
    exceptions: Exceptions
    warnings: tuple[str, ...] = ()

    KEYS = (*_OBEYED, *_REFUSED, *_BOOKKEEPING, "pack_dtype", "modules_to_not_convert")
    """The keys of quantization_config that are known."""

    @classmethod
    def read(cls, values: ConfigValues) -> GptqMethod:
        """Read quantization_config.

        Raises:
            UnsupportedModelError: If it asks for other bits or another layout.
            CheckpointError: If a value has the wrong type.
        """
        bits = values.integer("bits", 4)
        if bits not in _BITS:
            raise refused(values, "bits", bits, _BITS)
        key = "checkpoint_format" if values.raw.get("checkpoint_format") else "format"
        version = values.text(key, "gptq").lower()
        if version not in _ZERO_OFFSETS:
            raise refused(values, key, version, _ZERO_OFFSETS)
        for each, supported in _REFUSED.items():
            if values.raw.get(each):
                raise refused(values, each, values.raw[each], [supported])
        pack_type = values.text("pack_dtype", "int32")
        if pack_type != "int32":
            raise refused(values, "pack_dtype", pack_type, ["int32"])
        return cls(
            bits=bits,
            group_size=group_size_of(values, 128),
            symmetric=values.boolean("sym", True),
            activation_order=values.boolean("desc_act", False),
            zero_offset=_ZERO_OFFSETS[version],
            exceptions=Exceptions.read(values, "modules_to_not_convert"),
        )

    def weight(
        self, name: str, shape: tuple[int, int], stored: StoredTensors
    ) -> GptqWeight | None:
        """Find how a weight is stored; see `Method.weight`."""
        module, (num_outputs, num_inputs) = module_of(name), shape
        if stored.find(f"{module}.qweight") is None:
            return None
        size = divided(name, num_inputs, self.group_size)
        groups, per_word = num_inputs // size, WORD_BITS // self.bits
        if num_inputs % per_word or num_outputs % per_word:
            raise CheckpointError(
                f"{name} [{num_outputs}, {num_inputs}] cannot be packed as int{self.bits}: both "
                f"dimensions must be multiples of {per_word}",
                path=stored.folder,
            )
        weight = GptqWeight(
            name=name,
            shape=shape,
            parts=(
                stored.require(
                    f"{module}.qweight",
                    ("int32",),
                    {(num_inputs // per_word, num_outputs): f"(inputs/{per_word}, outputs)"},
                ),
                stored.require_scales(
                    f"{module}.scales", {(groups, num_outputs): "(groups, outputs)"}
                ),
                stored.require(
                    f"{module}.qzeros",
                    ("int32",),
                    {(groups, num_outputs // per_word): f"(groups, outputs/{per_word})"},
                ),
            ),
            bits=self.bits,
            group_size=size,
            symmetric=self.symmetric,
            zero_offset=self.zero_offset,
        )
        self.exceptions.check(weight)
        self._check_order(module, num_inputs, size, stored)
        if not stored.hollow:
            self._check_zero_points(weight)
        return weight

    def _check_order(self, module: str, num_inputs: int, size: int, stored: StoredTensors) -> None:
        name = f"{module}.g_idx"
        if stored.find(name) is not None:
            part = stored.require(name, ("int32",), {(num_inputs,): "(inputs)"})
            if not stored.hollow:
                require_group_order(part, size)
        elif self.activation_order and size < num_inputs:
            raise CheckpointError(
                f"{name} must be there, because quantization_config.desc_act is true; download "
                "the checkpoint again",
                path=stored.folder,
            )

    def _check_zero_points(self, weight: GptqWeight) -> None:
        zeros, part = weight.zero_points(), weight.parts[2]
        middle, number = 1 << (self.bits - 1), 1 << self.bits
        if self.symmetric and not (zeros == middle).all():
            raise CheckpointError(
                f"{part.name} must hold the zero point {middle} alone, because "
                f"quantization_config.sym is true, but holds {int(zeros[zeros != middle][0])}; "
                f"with {'0' if self.zero_offset else '1'} added to what is stored, "
                "checkpoint_format may be the other one",
                path=part.info.file,
            )
        if (zeros == number).any():
            # Version 1 stores zero - 1, which wraps for 0: kernels read it back as 16 or as 0.
            raise UnsupportedModelError(
                f"{part.name} holds the zero point {number}, which version 1 of the GPTQ format "
                "cannot tell from 0; take a checkpoint with checkpoint_format gptq_v2",
                key=part.name,
            )
        part.release()
