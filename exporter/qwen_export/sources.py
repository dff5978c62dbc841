"""What goes into the weights file, in its order, and where each tensor comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from qwen_export.checkpoint import Checkpoint, Tying
from qwen_export.checkpoint.quantized.weight import IntegerWeight
from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.errors import OptionError
from qwen_export.formats import (
    Recipe,
    Role,
    axis_of,
    imported_block_size,
    native_precision,
    role_of,
)
from qwen_export.model.parameters import Parameter, parameters
from qwen_export.quantization.options import QuantizationOptions
from qwen_export.quantization.quantizer import BlockwiseQuantizer, Quantizer, columns_at_a_time
from qwen_export.quantization.tensor import QuantizedTensor
from qwen_export.rotary import rotary_tables
from qwen_export.weights import (
    BlockFormat,
    Check,
    QuantizedSource,
    Source,
    TensorSource,
    to_float32,
)

__all__ = ["stored_names", "tensor_sources"]


def tensor_sources(
    checkpoint: Checkpoint,
    tying: Tying,
    max_context: int,
    recipe: Recipe | None = None,
    quantizer: Quantizer | None = None,
    exact_bits: Mapping[str, int | None] | None = None,
) -> list[Source]:
    """List the tensors of the weights file; none is read before it is written.

    A weight that the checkpoint stores in codes of so many bits or fewer keeps them.

    Args:
        checkpoint: Where they come from.
        tying: Which tables serve as embedding and output projection.
        max_context: Rows of the rotary tables.
        recipe: How weights are quantised; None for fp32.
        quantizer: What quantises the linear layers; None for the method of the recipe, which
            must then be one without calibration.
        exact_bits: What ``checkpoint.exact_bits`` gives; None to ask it.

    Raises:
        OptionError: If a pattern of weights to keep matches none, no weight uses the method or
            the block size asked for, or weights would be rounded a second time by default.
        ExportError: If no block size divides a weight's inputs.
    """
    cos, sin = rotary_tables(checkpoint.config, max_context)
    tables = {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin}
    names = stored_names(tying)
    if recipe is not None and exact_bits is None:
        exact_bits = checkpoint.exact_bits()
    wanted = parameters(checkpoint.config, tied=tying.tied, max_context=max_context)
    roles = {parameter.name: role_of(parameter, tied=tying.tied) for parameter in wanted}
    if recipe is not None:
        recipe.check_keep(roles.items())
    sources: list[Source] = []
    for parameter in wanted:
        name, role = parameter.name, roles[parameter.name]
        if name in tables:
            sources.append(TensorSource(name, parameter.shape, partial(tables.__getitem__, name)))
            continue
        stored = names.get(name, name)
        options = None
        if recipe is not None and role != "float":
            _, outputs = _inputs_and_outputs(parameter)
            options = recipe.options_for(name, role, outputs)
        if recipe is not None and recipe.native and role == "linear":
            options = options if stored in checkpoint.quantized else None
        if options is None:
            source: Source = TensorSource(
                name,
                parameter.shape,
                read=partial(checkpoint.read, stored),
                transposed=parameter.transposed,
                done=partial(checkpoint.release, stored),
            )
        else:
            # A calibrated quantizer takes linear layers of the recipe's own format alone.
            calibrated = recipe is not None and options == recipe.linears and role == "linear"
            chosen = quantizer if quantizer and calibrated else BlockwiseQuantizer(options)
            bits = (exact_bits or {}).get(stored)
            source = _quantized_source(checkpoint, parameter, stored, options, chosen, role, bits)
        sources.append(source)
    if recipe is not None:
        _check_use(checkpoint, recipe, sources, names, exact_bits or {})
    return sources


def _check_use(
    checkpoint: Checkpoint,
    recipe: Recipe,
    sources: Sequence[Source],
    names: Mapping[str, str],
    exact_bits: Mapping[str, int | None],
) -> None:
    """Refuse options that no weight uses, and rounding that was not asked for."""
    made = [
        source
        for source in sources
        if isinstance(source, QuantizedSource) and source.method != "imported"
    ]
    method = recipe.linears.method
    if recipe.method_given and method not in {source.method for source in made}:
        raise OptionError(
            f"--quantizer {method} has no weight to quantise: those that the precision and --keep "
            "leave to it are none, or are stored quantised already and kept exactly; leave it out"
        )
    if not recipe.linears.or_smaller and not made:
        raise OptionError(
            f"--block-size {recipe.linears.block_size} has no weight to quantise: all are stored "
            "quantised already and kept exactly, or kept in fp32; leave it out"
        )
    again = [source for source in made if names.get(source.name, source.name) in exact_bits]
    if again and not recipe.method_given:
        count = f"{len(again)} weights" if len(again) > 1 else "a weight"
        raise OptionError(
            f"{again[0].format.name} would round {count} of {checkpoint.path} a second time "
            f"({again[0].name}): what it stores quantised does not fit symmetric codes of "
            f"{again[0].format.bits} bits; --precision {native_precision(exact_bits.values())} "
            "keeps every weight exactly, --quantizer search rounds again"
        )


def stored_names(tying: Tying) -> dict[str, str]:
    """Where the checkpoint keeps tensors that the graphs know by another name."""
    return {EMBEDDING_NAME: tying.embedding, LM_HEAD_NAME: tying.lm_head}


def _inputs_and_outputs(parameter: Parameter) -> tuple[int, int]:
    """K and N: of a table [V, E] the width and the tokens."""
    first, second = parameter.shape
    return (first, second) if parameter.transposed else (second, first)


def _quantized_source(
    checkpoint: Checkpoint,
    parameter: Parameter,
    stored: str,
    options: QuantizationOptions,
    quantizer: Quantizer,
    role: Role,
    exact_bits: int | None,
) -> QuantizedSource:
    name, own = parameter.name, checkpoint.quantized.get(stored)
    shape, done = _inputs_and_outputs(parameter), partial(checkpoint.release, stored)
    axis = axis_of(role)
    if isinstance(own, IntegerWeight) and exact_bits in range(options.bits + 1):
        form = BlockFormat(options.bits, imported_block_size(name, own.group_size), axis)
        return QuantizedSource(
            name, shape, form, partial(_imported, checkpoint, stored, form), "imported", done
        )
    form = BlockFormat(options.bits, options.block_size_of(name, shape[0]), axis)
    parts = partial(_quantized, checkpoint, name, stored, quantizer)
    return QuantizedSource(name, shape, form, parts, options.method, done)


def _imported(
    checkpoint: Checkpoint, stored: str, form: BlockFormat, check: Check
) -> Iterator[QuantizedTensor]:
    """A weight's own codes; a scale is repeated where a block is part of its group."""
    own = checkpoint.read_quantized(stored)
    if own is None:
        raise AssertionError(f"{stored} was said to be exact in {form.bits} bits")
    scales = np.repeat(own.scales, own.block_size // form.block_size, axis=0)
    check(stored, scales)
    yield QuantizedTensor(own.codes, scales, form.bits, form.block_size)


def _quantized(
    checkpoint: Checkpoint, name: str, stored: str, quantizer: Quantizer, check: Check
) -> Iterator[QuantizedTensor]:
    """Slices of a weight's outputs, which a checkpoint has as rows, [N, K]."""
    weight = checkpoint.read(stored)
    outputs, inputs = weight.shape
    step = columns_at_a_time(inputs)
    for start in range(0, outputs, step):
        rows = to_float32(weight[start : start + step])
        check(name, rows)
        checkpoint.release(stored)
        yield quantizer(np.ascontiguousarray(rows.T), name=name, start=start)
