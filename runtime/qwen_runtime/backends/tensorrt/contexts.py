"""An execution context: its shapes and addresses set, its engine run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen_runtime.backends.tensorrt.loaded import PhasePlan
from qwen_runtime.backends.tensorrt.seam import Seam
from qwen_runtime.errors import BackendError

__all__ = ["Context", "Scratch", "input_shapes"]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that all contexts share, since never two of them run at once."""

    address: int
    num_bytes: int


class Context:
    """One execution context of a phase.

    Args:
        seam: TensorRT and CUDA.
        plan: What it runs.
        stream: What it runs on.
        scratch: Its scratch memory.
        fixed_shape: See `Seam.new_context`.
    """

    def __init__(
        self, seam: Seam, plan: PhasePlan, stream: int, scratch: Scratch, *, fixed_shape: bool
    ) -> None:
        self._seam, self._stream = seam, stream
        self._handle = seam.new_context(plan.engine, plan.profile, stream, fixed_shape=fixed_shape)
        seam.set_scratch(self._handle, scratch.address, scratch.num_bytes)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Iterable[tuple[str, int]]
    ) -> None:
        """Set every input's shape and every tensor's address.

        Raises:
            BackendError: If a shape is outside of the profile, or a tensor was left out.
        """
        for name, shape in shapes.items():
            self._seam.set_shape(self._handle, name, shape)
        for name, address in addresses:
            self._seam.set_address(self._handle, name, address)
        missing = self._seam.missing(self._handle)
        if missing:
            raise BackendError(
                f"every tensor of an engine must be bound, got none for {', '.join(missing)}"
            )

    @property
    def capturable(self) -> bool:
        """Whether a run may be captured in a graph."""
        return self._seam.capturable(self._handle, self._stream)

    def enqueue(self) -> None:
        """Run the engine after what the stream holds."""
        self._seam.enqueue(self._handle, self._stream)

    def close(self) -> None:
        """Destroy it."""
        self._seam.free_context(self._handle)


def input_shapes(
    plan: PhasePlan, rows: int, sequence: int, num_logits: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs of a call."""
    sizes = {
        "input_ids": (rows, sequence),
        "past_lengths": (rows,),
        "logits_indices": (rows, num_logits),
    }
    return {
        tensor.name: sizes.get(tensor.name, (rows, *tensor.shape[1:]))
        for tensor in plan.tensors
        if tensor.is_input
    }
