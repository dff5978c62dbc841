"""Which weight is stored how: the one rule of a bundle's precision.

linear layers    the precision asked for; of a quantised checkpoint's own precision those that it
                 stores quantised
lm_head          the precision asked for, tied or not; int8 in a quantised checkpoint's own
                 precision, and where it is tied and its vocabulary odd
embedding        int8 in int8 and int4 bundles, because a step reads one row of it
everything else  fp32: norms, biases, rotary tables, and what --keep names

A tied table is stored once. What --keep names becomes int8 where the pattern says so.
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
    "Recipe",
    "Role",
    "axis_of",
    "imported_block_size",
    "native_precision",
    "role_of",
]

PRECISIONS = ("fp32", "int8", "int4")
"""Formats of the weights that are offered."""
_KEPT_AS = ("fp32", "int8")
"""Formats that --keep offers; the first where a pattern names none."""

Role = Literal["linear", "embedding", "lm_head", "tied table", "float"]
"""What a tensor of the graphs does; "float" is what is never quantised."""

_DEFAULTS = {
    "int8": QuantizationOptions(8, 128, "search", or_smaller=True),
    "int4": QuantizationOptions(4, 128, "search", or_smaller=True),
}
"""What is not asked for, by precision. Blocks are as large as error allows: fewer scales are fewer
bytes to read, and larger blocks cost the kernels less."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights of a bundle are quantised."""

    linears: QuantizationOptions
    """Format and method of the linear layers."""
    in_bytes: QuantizationOptions
    """Those of an embedding, and of other weights that stay int8."""
    keep: tuple[str, ...] = ()
    """Patterns, as of a shell, of the weights that are stored in fp32, or with "=int8" after the
    pattern in int8."""
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
            OptionError: If an option has no use for the precision, or a weight is to be kept in
                a format that is not offered.
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
        for pattern in keep:
            _, _, form = pattern.partition("=")
            if form and form not in _KEPT_AS:
                raise OptionError(
                    f"--keep PATTERN=FORMAT keeps weights in {' or '.join(_KEPT_AS)}, got {pattern}"
                )
        return cls(
            linears,
            replace(linears, bits=8, method=_uncalibrated(linears.method)),
            keep,
            native,
            method is not None,
        )

    def options_for(self, name: str, role: Role, outputs: int) -> QuantizationOptions | None:
        """Format and method of a tensor; None for fp32.

        Args:
            name: What it is called.
            role: What it does.
            outputs: N of a weight: of a table the tokens of the vocabulary.
        """
        if role == "float":
            return None
        kept = {_format_of(pattern) for pattern in self.keep if _matches(pattern, name, role)}
        if "fp32" in kept:
            return None
        if "int8" in kept or role == "embedding":
            return self.in_bytes
        if role == "linear":
            return self.linears
        # A packed column of an odd table would begin within a byte, every other row.
        if self.native or (role == "tied table" and outputs % 2):
            return self.in_bytes
        # Calibration sees the inputs of linear layers only.
        return replace(self.linears, method=_uncalibrated(self.linears.method))

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
    return any(fnmatchcase(each, pattern.partition("=")[0]) for each in names)


def _format_of(pattern: str) -> str:
    return pattern.partition("=")[2] or _KEPT_AS[0]


def _uncalibrated(method: Method) -> Method:
    return "search" if method == "gptq" else method


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
