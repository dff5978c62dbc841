"""What TensorRT says while it parses and builds: part of it means that the engine is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from qwen_export.targets.plan import Kernel

__all__ = ["Messages", "new_logger"]

# Warnings of the builder that mean wrong numbers: a dropped input, a cache too short.
_FATAL = ("Unused Input", "not self-consistent")
# TensorRT names the function's node after the first call and says so at every other one; int64
# inputs are bound as such; a second builder's logger is not the process's, yet hears of its build.
_HARMLESS = (
    "A node named Attention already exists",
    "has Int64 binding",
    "The logger passed into createInferBuilder differs",
)
_KERNEL = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs:")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(slots=True)
class Messages:
    """Messages of one graph's parser and builder, sorted."""

    errors: list[str] = field(default_factory=list)
    fatal_warnings: list[str] = field(default_factory=list)
    """Warnings that mean wrong numbers."""
    warnings: list[str] = field(default_factory=list)
    """Other warnings, but for those that every graph here causes."""
    activation_bytes: list[int] = field(default_factory=list)
    """Scratch memory of each profile."""
    weight_bytes: int | None = None
    """Of the whole engine; None until the builder tells."""
    kernels: list[Kernel] = field(default_factory=list)
    """Steps of the engine, profile after profile."""

    def add(self, level: str, message: str) -> None:
        """Sort one message; ``level`` is the name of its severity."""
        if level in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif level == "WARNING" and any(fatal in message for fatal in _FATAL):
            self.fatal_warnings.append(message)
        elif level == "WARNING" and not any(harmless in message for harmless in _HARMLESS):
            self.warnings.append(message)
        elif level == "INFO" and (match := _ACTIVATIONS.search(message)):
            self.activation_bytes.append(int(match[1]))
        elif level == "INFO" and (match := _WEIGHTS.search(message)):
            self.weight_bytes = int(match[1])
        elif level == "VERBOSE":
            for match in _KERNEL.finditer(message):
                self.kernels.append(Kernel(match["name"], match["kind"]))


def new_logger(trt: ModuleType, messages: Messages) -> Any:
    """An ``ILogger``, a class that exists in TensorRT's module alone, that fills ``messages``."""
    base: Any = trt

    class Logger(base.ILogger):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            base.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.add(severity.name, message)

    return Logger()
