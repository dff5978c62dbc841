"""A lowered graph with weights of its own, as a session on the CPU loads it.

The graph of ``lowered/cpu`` holds no weights: lowered.json says what they are made of. A session
would have to be given them in memory and keep them there, beside what it packs of them. So they are
written to a file beside a copy of the graph, which a session maps or packs like any other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen_runtime.backends.lowered_contents import pieces
from qwen_runtime.backends.model_file import Entries, with_attribute, with_external_data
from qwen_runtime.backends.packed_file import ALIGNMENT
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_file import LoweredFolder

__all__ = ["EXACT_LEVEL", "SERVED_LEVEL", "write_graph"]

SERVED_LEVEL, EXACT_LEVEL = 4, 0
"""Accuracy levels of MatMulNBits: 4 multiplies int8 activations, 0 fp32 ones."""


def write_graph(
    lowered: LoweredFolder, weights: Path, model: Path, data: Path, *, accuracy_level: int
) -> None:
    """Write a copy of a lowered prefill graph, and its weights as it takes them.

    Args:
        lowered: The graph and what its weights are made of.
        weights: The bundle's weights file.
        model: The .onnx file to create.
        data: The file of weights to create, in the same folder.
        accuracy_level: `SERVED_LEVEL` or `EXACT_LEVEL`.

    Raises:
        BundleError: If the graph is damaged, or its description does not fit it or the weights.
        OSError: If a file cannot be read or written.
    """
    entries = {entry.name: entry for entry in lowered.description.initializers}
    source = lowered.graph_file("prefill")
    with data.open("xb") as file:

        def place(name: str, _: Entries) -> Entries:
            start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(start)
            for piece in pieces(entries[name], weights):
                file.write(np.ascontiguousarray(piece).data)
            length = file.tell() - start
            return {"location": data.name, "offset": str(start), "length": str(length)}

        try:
            written = with_external_data(source.read_bytes(), place)
            written = with_attribute(written, "MatMulNBits", "accuracy_level", accuracy_level)
        except BundleError:
            raise
        except (IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
            raise BundleError(
                f"{source} must be a graph with the initializers that lowered.json lists: "
                f"{error!r}; make it again: {lowered.remake_command}",
                path=source,
            ) from error
    model.write_bytes(written)
