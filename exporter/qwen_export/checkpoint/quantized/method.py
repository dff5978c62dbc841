"""What all quantisation methods of a checkpoint have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.parts import StoredTensors
from qwen_export.checkpoint.quantized.weight import QuantizedWeight
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["Exceptions", "Method", "block_of", "divided", "group_size_of", "module_of", "refused"]


class Method(Protocol):
    """How a checkpoint's quantization_config says that weights are stored."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the config asks for beside quantised weights and is left out."""

    def weight(
        self, name: str, shape: tuple[int, int], stored: StoredTensors
    ) -> QuantizedWeight | None:
        """Find how a weight is stored.

        Args:
            name: The plain weight's name.
            shape: Its shape, (N, K).
            stored: What the files hold.

        Returns:
            The quantised weight, its parts checked; None for one that is stored plain.

        Raises:
            CheckpointError: If a part is missing, has another shape or type, or contradicts the
                config.
            UnsupportedModelError: If it is stored in a way that is not supported.
        """


@dataclass(frozen=True, slots=True)
class Exceptions:
    """Modules that the config says are not quantised."""

    key: str
    """The key that lists them."""
    modules: tuple[str, ...]
    """Names or parts of names: "lm_head", "model.layers.0.mlp"."""

    @classmethod
    def read(cls, values: ConfigValues, *keys: str) -> Exceptions:
        """Read the first of some keys that is there: a list of strings or null.

        Raises:
            CheckpointError: If it holds something else.
        """
        for key in keys:
            listed = values.raw.get(key)
            if listed is None:
                continue
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise values.error(key, "must be a list of module names or null", listed)
            return cls(key, tuple(listed))
        return cls(keys[0], ())

    def check(self, weight: QuantizedWeight) -> None:
        """Refuse a weight that is quantised though listed; what is stored plain stays plain."""
        module = f".{module_of(weight.name)}."
        for listed in self.modules:
            if f".{listed.strip('.')}." in module:
                info = weight.info
                raise CheckpointError(
                    f"{weight.parts[0].name} in {info.file.name} is quantised, but "
                    f"quantization_config.{self.key} lists {listed!r}; one of the two files is "
                    "wrong",
                    path=info.file,
                )


def module_of(name: str) -> str:
    """The module of a weight: its name without ".weight"."""
    return name.removesuffix(".weight")


def group_size_of(values: ConfigValues, default: int) -> int | None:
    """Read group_size; -1 is None, all inputs.

    Raises:
        CheckpointError: If it is something else than -1 or a positive integer.
    """
    size = values.raw.get("group_size", default)
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise values.error("group_size", "must be an integer >= 1, or -1 for all inputs", size)
    return None if size == -1 else size


def block_of(values: ConfigValues, key: str, otherwise: str = "") -> tuple[int, int]:
    """Read a block: outputs and inputs that share a scale.

    Args:
        values: The object the key is in.
        key: The key.
        otherwise: What else may stand there, for the message.

    Raises:
        CheckpointError: If it is not a list of two positive integers.
    """
    block = values.raw.get(key)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in block)
    ):
        raise values.error(key, f"must be two integers >= 1{otherwise}", block)
    return block[0], block[1]


def divided(name: str, num_inputs: int, group_size: int | None) -> int:
    """The group size of a weight, which must divide its inputs.

    Args:
        name: The weight, for the message.
        num_inputs: K.
        group_size: As configured; None for all inputs.

    Returns:
        Inputs in a group.

    Raises:
        CheckpointError: If it does not divide.
    """
    size = group_size or num_inputs
    if num_inputs % size:
        raise CheckpointError(
            f"quantization_config.group_size must divide the {num_inputs} inputs of {name}, got "
            f"{size}"
        )
    return size


def refused(
    values: ConfigValues, key: str, value: object, supported: Iterable[object]
) -> UnsupportedModelError:
    """Make the error for a value that is known or plausible, but not supported.

    Args:
        values: The object the key is in.
        key: The key.
        value: What it holds.
        supported: What is supported.

    Returns:
        The error, to be raised by the caller.
    """
    listed = " and ".join(str(each) for each in supported)
    return UnsupportedModelError(
        f"{values.path}: {values.prefix}{key} {value!r} is not supported; {listed} "
        f"{'are' if ' and ' in listed else 'is'}",
        key=f"{values.prefix}{key}",
    )
