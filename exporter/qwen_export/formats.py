"""Which weight is stored how: the one rule of a bundle's precision.

linear layers        the precision asked for; of a quantised checkpoint's own precision those that
                     it stores quantised
embedding, lm_head   int8, in int8 and int4 bundles; a tied table is stored once
everything else      fp32: norms, biases, rotary tables, and what --keep names
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.errors import ExportError, OptionError
from qwen_export.model.parameters import Parameter
from qwen_export.quantization.options import KERNEL_BLOCK_SIZES, Method, QuantizationOptions

__all__ = [
    "PRECISIONS",
    "TABLE_BITS",
    "Recipe",
    "Role",
    "axis_of",
    "imported_block_size",
    "native_precision",
    "role_of",
]

PRECISIONS = ("fp32", "int8", "int4")
"""Formats of the weights that are offered."""
TABLE_BITS = 8
"""Of embedding and output projection: every token passes both."""

Role = Literal["linear", "embedding", "lm_head", "tied table", "float"]
"""What a tensor of the graphs does; "float" is what is never quantised."""

_DEFAULTS = {
    "int8": QuantizationOptions(8, 128, "search", or_smaller=True),
    "int4": QuantizationOptions(4, 64, "search", or_smaller=True),
}
"""What is not asked for, by precision. Blocks are as large as error allows: fewer scales are fewer
bytes to read, and larger blocks cost the kernels less."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights of a bundle are quantised."""

    linears: QuantizationOptions
    """Format and method of the linear layers."""
    tables: QuantizationOptions
    """Format and method of embedding and output projection."""
    keep: tuple[str, ...] = ()
    """Patterns, as of a shell, of the weights that are stored in fp32."""
    native: bool = False
    """Whether this is a quantised checkpoint's own precision, in which the linear layers that it
    stores as floats stay fp32."""
    method_given: bool = False
    """Whether the method was asked for, not taken by default. Then it may round a second time what
    a checkpoint stores quantised."""

    @classmethod
    def of(
        cls,
        precision: str,
        block_size: int | None = None,
        method: Method | None = None,
        *,
        keep: tuple[str, ...] = (),
        native: bool = False,
    ) -> Recipe | None:
        """The recipe of a precision, None for fp32; what is not given takes its default.

        Raises:
            OptionError: If an option has no use for fp32.
            ExportError: If a value is not one of those that exist.
        """
        if precision == "fp32":
            if block_size is not None or method is not None or keep:
                raise OptionError(
                    "--block-size, --quantizer and --keep need weights to quantise, but the "
                    "precision is fp32; choose --precision int8 or int4, or leave them out"
                )
            return None
        linears = _DEFAULTS[precision]
        if block_size is not None:
            linears = replace(linears, block_size=block_size, or_smaller=False)
        if method is not None:
            linears = replace(linears, method=method)
        # Calibration sees the inputs of linear layers only.
        tables = replace(
            linears, bits=TABLE_BITS, method="search" if method == "gptq" else linears.method
        )
        return cls(linears, tables, keep, native, method is not None)

    def options_for(self, name: str, role: Role) -> QuantizationOptions | None:
        """Format and method of a tensor by what it does and what it is called; None for fp32."""
        if role == "float" or any(_matches(pattern, name, role) for pattern in self.keep):
            return None
        return self.linears if role == "linear" else self.tables

    def check_keep(self, roles: Iterable[tuple[str, Role]]) -> None:
        """Refuse a pattern that keeps nothing.

        Args:
            roles: Name and role of every tensor.

        Raises:
            OptionError: If a pattern matches no weight that could be quantised.
        """
        weights = [(name, role) for name, role in roles if role != "float"]
        for pattern in self.keep:
            if not any(_matches(pattern, name, role) for name, role in weights):
                raise OptionError(
                    f"--keep {pattern} matches none of the {len(weights)} weights that can be "
                    f"quantised; their names are like {weights[-1][0]}"
                )


def _matches(pattern: str, name: str, role: Role) -> bool:
    # A tied table is known by both its names.
    names = (EMBEDDING_NAME, LM_HEAD_NAME) if role == "tied table" else (name,)
    return any(fnmatchcase(each, pattern) for each in names)


def native_precision(exact_bits: Iterable[int | None]) -> str:
    """The precision that keeps every weight of a checkpoint as it is stored.

    Args:
        exact_bits: Of the weights that are stored quantised; see ``Checkpoint.exact_bits``.

    Returns:
        "int4" or "int8" where symmetric codes of so many bits hold all of them exactly; "fp32"
        for a plain checkpoint, and where no such codes hold one (FP8).
    """
    bits = list(exact_bits)
    known = [each for each in bits if each is not None]
    return f"int{max(known)}" if known and len(known) == len(bits) else "fp32"


def role_of(parameter: Parameter, *, tied: bool) -> Role:
    """What a tensor of the graphs does."""
    if parameter.name == EMBEDDING_NAME:
        return "tied table" if tied else "embedding"
    if parameter.name == LM_HEAD_NAME:
        return "lm_head"
    return "linear" if parameter.transposed else "float"


def axis_of(role: Role) -> Literal[0, 1]:
    """The axis of a quantised weight's inputs, as stored.

    An embedding that is nothing else keeps its rows together, because rows are what is read.
    """
    return 1 if role == "embedding" else 0


def imported_block_size(name: str, group_size: int) -> int:
    """The largest block that fused kernels take and that a checkpoint's group is made of.

    Raises:
        ExportError: If there is none. It names the weight.
    """
    for size in reversed(KERNEL_BLOCK_SIZES):
        if group_size % size == 0:
            return size
    raise ExportError(
        f"{name}: a group of {group_size} inputs must be made of blocks of "
        f"{KERNEL_BLOCK_SIZES[0]}; build with --precision fp32, or with --keep {name}"
    )
