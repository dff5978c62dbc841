"""How the initializers of a lowered graph are read from the bundle's weights file.

A lowered graph holds no weights: each of its large initializers is one tensor of weights.bin, or
several side by side, in another arrangement or type. ``lowered.json`` says which, and whoever
runs the graph reads it so, once for both graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import onnx_ir as ir

from qwen_runtime.lowered_description import InitializerEntry, Layout, PartEntry

__all__ = ["StoredInitializers"]


@dataclass(slots=True)
class StoredInitializers:
    """The initializers of one graph whose data lie in the weights file."""

    parts: dict[str, PartEntry]
    """Tensors of the file, by the name the portable graph knows them under."""
    made: dict[str, InitializerEntry] = field(default_factory=dict)
    """What rewrites made of them, by the new name."""

    @classmethod
    def of(cls, graph: ir.Graph) -> StoredInitializers:
        """Those of a bundle's portable graph, before anything is rewritten."""
        parts = {}
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                parts[name] = PartEntry(
                    name=name,
                    dtype=cast("Any", tensor.dtype.name.lower()),
                    shape=tuple(tensor.shape.numpy()),
                    offset=tensor.offset or 0,
                    num_bytes=tensor.nbytes,
                )
        return cls(parts)

    def make(
        self,
        graph: ir.Graph,
        name: str,
        sources: Sequence[str],
        dtype: ir.DataType,
        shape: Sequence[int],
        *,
        layout: Layout = "plain",
        axis: int = 0,
        block_size: int | None = None,
    ) -> ir.Value:
        """Add an initializer that is read from tensors of the file, or find the one made before.

        Args:
            graph: Where to add it.
            name: Its name.
            sources: Tensors that lie side by side in it, in this order.
            dtype: Its type, to which the file's values are cast.
            shape: Its shape, after ``layout`` was applied.
            layout: How the tensors become it.
            axis: Axis of the stored tensors along which they are joined.
            block_size: Of codes: inputs that share a scale.
        """
        if name in self.made:
            return graph.initializers[name]
        self.made[name] = InitializerEntry(
            name=name,
            dtype=cast("Any", dtype.name.lower()),
            shape=tuple(shape),
            layout=layout,
            parts=tuple(self.parts[source] for source in sources),
            axis=axis,
            block_size=block_size,
        )
        value = ir.val(name, dtype=dtype, shape=ir.Shape(shape))
        # In place of the portable one of the same name, which nothing reads any longer.
        graph.initializers.pop(name, None)
        graph.initializers[name] = value
        return value

    def bind(self, graph: ir.Graph, location: str, num_bytes: int) -> tuple[InitializerEntry, ...]:
        """Point every such initializer at the file, and say how each is to be read.

        They point behind the file's end. ONNX Runtime does not look there for one that it is
        given, and one that it is not given is an error instead of other numbers.

        Args:
            graph: The rewritten graph; initializers that nothing reads are gone.
            location: The weights file as the graph names it.
            num_bytes: Its size.
        """
        entries = []
        for name, value in graph.initializers.items():
            entry = self.made.get(name) or self._plain(name, value)
            if entry is None:
                continue
            if value.dtype is None or value.shape is None:
                raise AssertionError(f"{name} must have a type and a shape")
            length = -(-math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8)
            value.const_value = ir.ExternalTensor(
                location, num_bytes, length, value.dtype, shape=value.shape, name=name
            )
            entries.append(entry)
        return tuple(entries)

    def _plain(self, name: str, value: ir.Value) -> InitializerEntry | None:
        part = self.parts.get(name)
        if part is None:
            return None
        if value.dtype is None:
            raise AssertionError(f"{name} must have a type")
        dtype = cast("Any", value.dtype.name.lower())
        return InitializerEntry(name, dtype, part.shape, "plain", (part,))
