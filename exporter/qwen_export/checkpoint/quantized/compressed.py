"""compressed-tensors checkpoints: integers packed or one a byte, and FP8.

Shape letters: K inputs, N outputs, G groups of inputs, P codes in a 32-bit word.

    weight_packed     [N, ceil(K / P)] int32   lowest bits first; a code is stored from 0
    weight            [N, K] int8 or e4m3      formats int-, float- and naive-quantized
    weight_scale      [N, G], [N, 1] or [1]    any float type
    weight_zero_point [ceil(N / P), G] int32   packed along the outputs; int8 [N, G] where not
    weight_shape      [2]                      (N, K)
    weight_g_idx      [K] int32                the group of every input

Source:
    compressed-tensors ``pack_to_int32`` and ``unpack_from_int32`` (pack_quantized/helpers.py),
    ``PackedQuantizationCompressor`` and ``NaiveQuantizationCompressor``, ``_dequantize``
    (lifecycle/forward.py; it multiplies in the type of the scales).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.fp8 import FLOAT8, Float8Weight, scale_grids
from qwen_export.checkpoint.quantized.method import divided, module_of, refused
from qwen_export.checkpoint.quantized.parts import Part, StoredTensors, require_group_order
from qwen_export.checkpoint.quantized.scheme import (
    ModuleGroup,
    WeightScheme,
    match_rank,
    read_groups,
    read_targets,
)
from qwen_export.checkpoint.quantized.weight import (
    WORD_BITS,
    FloatArray,
    IntegerWeight,
    QuantizedWeight,
    ShortArray,
    unpack_words,
)
from qwen_export.errors import CheckpointError

__all__ = ["CompressedMethod", "CompressedWeight"]

# Keys that must ask for nothing, and what is supported instead.
_REFUSED = {
    "sparsity_config": "dense weights",
    "transform_config": "weights as the model has them",
}
_DENSE = "dense"
_BOOKKEEPING = ("global_compression_ratio", "quant_method", "run_compressed", "version")


@dataclass(frozen=True, slots=True)
class CompressedWeight(IntegerWeight):
    """An integer weight; parts are the codes, the scales and maybe the zero points."""

    packed: bool
    """Whether codes and zero points are packed into 32-bit words, counted from 0."""

    def codes(self, outputs: slice) -> npt.NDArray[np.integer]:
        """Codes of some outputs, from 0 where packed, else signed, [K, n]."""
        stored = self.parts[0].read()[outputs]
        if self.packed:
            # The last word of a row may not be full.
            stored = unpack_words(stored, self.bits)[:, : self.shape[1]]
        return stored.T

    def zero_points(self) -> ShortArray:
        """The codes that stand for 0, [G, N], or [1, 1] for one of all."""
        if len(self.parts) == 2:
            return np.full((1, 1), 1 << (self.bits - 1) if self.packed else 0, np.int16)
        stored = self.parts[2].read()
        if stored.dtype == np.int32:
            unpacked = unpack_words(stored.T, self.bits)[:, : self.shape[0]]
            return unpacked.astype(np.int16)
        zeros = self._by_group(stored).astype(np.int16)
        return zeros + np.int16(1 << (self.bits - 1)) if self.packed else zeros

    def scales(self) -> FloatArray:
        """[G, N]."""
        return self._by_group(self.parts[1].read()).astype(np.float32)

    def _by_group(self, stored: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[N, G] or one for all, as [G, N]."""
        num_outputs, num_inputs = self.shape
        groups = num_inputs // self.group_size
        rows = stored.reshape(1, 1) if stored.size == 1 else stored.reshape(num_outputs, groups)
        return np.ascontiguousarray(np.broadcast_to(rows, (num_outputs, groups)).T)


@dataclass(frozen=True, slots=True)
class CompressedMethod:
    """quant_method "compressed-tensors"."""

    groups: tuple[ModuleGroup, ...]
    ignore: tuple[str, ...]
    """Targets that are not quantised whatever the groups say."""
    warnings: tuple[str, ...]

    KEYS = (
        "config_groups",
        "format",
        "ignore",
        "kv_cache_scheme",
        "quantization_status",
        *_REFUSED,
        *_BOOKKEEPING,
    )
    """The keys of quantization_config that are known."""

    @classmethod
    def read(cls, values: ConfigValues) -> CompressedMethod:
        """Read quantization_config.

        Raises:
            UnsupportedModelError: If it asks for a format that is not supported.
            CheckpointError: If a value has the wrong type.
        """
        for key, supported in _REFUSED.items():
            asked = values.mapping(key)
            if asked and asked.get("format") != _DENSE:
                raise refused(values, key, asked, [supported])
        status = values.text("quantization_status", "compressed")
        if status != "compressed":
            raise refused(values, "quantization_status", status, ["'compressed'"])
        groups = read_groups(values)
        warnings = []
        if any(group.activations for group in groups):
            warnings.append("quantised activations")
        if values.raw.get("kv_cache_scheme"):
            warnings.append("kv_cache_scheme")
        return cls(groups, read_targets(values, "ignore"), tuple(warnings))

    def weight(
        self, name: str, shape: tuple[int, int], stored: StoredTensors
    ) -> QuantizedWeight | None:
        """Find how a weight is stored; see `Method.weight`."""
        packed = stored.find(f"{module_of(name)}.weight_packed")
        plain = stored.find(name)
        codes = packed or plain
        if codes is None or (packed is None and codes.info.dtype not in ("int8", FLOAT8)):
            return None
        scheme = self._scheme(name)
        if scheme is None:
            raise CheckpointError(
                f"{codes.name} in {codes.info.file.name} is quantised, but config_groups and "
                f"ignore of quantization_config leave {module_of(name)} as it is; one of the two "
                "files is wrong",
                path=codes.info.file,
            )
        if scheme.kind == "float":
            return _float_weight(name, shape, scheme, stored)
        return _integer_weight(name, shape, scheme, stored)

    def _scheme(self, name: str) -> WeightScheme | None:
        """The scheme of the closest target, the first of equals, as compressed-tensors has it."""
        if any(match_rank(name, target) is not None for target in self.ignore):
            return None
        ranked = [
            (rank, i)
            for i, group in enumerate(self.groups)
            for target in group.targets
            if (rank := match_rank(name, target)) is not None
        ]
        return self.groups[min(ranked)[1]].weights if ranked else None


def _float_weight(
    name: str, shape: tuple[int, int], scheme: WeightScheme, stored: StoredTensors
) -> Float8Weight:
    size = divided(name, shape[1], scheme.group_size)
    block = {
        "tensor": shape,
        "channel": (1, shape[1]),
        "group": (1, size),
        "block": scheme.block or shape,
    }[scheme.strategy]
    grids = scale_grids(shape, [block])
    codes = stored.require(name, (FLOAT8,), {shape: "(outputs, inputs)"})
    meanings = dict.fromkeys(grids, f"(one for each {block[0]}x{block[1]} block)")
    scales = stored.require_scales(f"{module_of(name)}.weight_scale", meanings)
    return Float8Weight(name, shape, (codes, scales), block)


def _integer_weight(
    name: str, shape: tuple[int, int], scheme: WeightScheme, stored: StoredTensors
) -> CompressedWeight:
    module, (num_outputs, num_inputs) = module_of(name), shape
    size = divided(name, num_inputs, scheme.group_size)
    if scheme.packed:
        width = -(-num_inputs * scheme.bits // WORD_BITS)
        meaning = f"(outputs, inputs*{scheme.bits}/32)"
        codes = stored.require(
            f"{module}.weight_packed", ("int32",), {(num_outputs, width): meaning}
        )
        _check_shape(f"{module}.weight_shape", shape, stored)
    else:
        codes = stored.require(name, ("int8",), {shape: "(outputs, inputs)"})
    block = shape if scheme.strategy == "tensor" else (1, size)
    grids = dict.fromkeys(scale_grids(shape, [block]), "(outputs, groups)")
    parts = [codes, stored.require_scales(f"{module}.weight_scale", grids)]
    if not scheme.symmetric:
        parts.append(_zero_points(module, shape, scheme, grids, stored))
    groups = stored.find(f"{module}.weight_g_idx")
    if groups is not None:
        groups = stored.require(groups.name, ("int32",), {(num_inputs,): "(inputs)"})
        if not stored.hollow:
            require_group_order(groups, size)
    return CompressedWeight(
        name, shape, tuple(parts), scheme.bits, size, scheme.symmetric, scheme.packed
    )


def _zero_points(
    module: str,
    shape: tuple[int, int],
    scheme: WeightScheme,
    grids: dict[tuple[int, ...], str],
    stored: StoredTensors,
) -> Part:
    name = f"{module}.weight_zero_point"
    # One zero point for a whole tensor is not packed.
    if not scheme.packed or scheme.strategy == "tensor":
        return stored.require(name, ("int8",), grids)
    height = -(-shape[0] * scheme.bits // WORD_BITS)
    groups = shape[1] // (scheme.group_size or shape[1])
    return stored.require(
        name, ("int32",), {(height, groups): f"(outputs*{scheme.bits}/32, groups)"}
    )


def _check_shape(name: str, shape: tuple[int, int], stored: StoredTensors) -> None:
    if stored.find(name) is None:
        return
    part = stored.require(name, ("int64", "int32"), {(2,): "(dimensions)"})
    if stored.hollow:
        return
    given = tuple(int(each) for each in part.read())
    if given != shape:
        raise CheckpointError(
            f"{name} must be {list(shape)}, as config.json describes the model, got {list(given)}",
            path=part.info.file,
        )
