"""Where a verification runs a bundle: on the CPU as a build does, or on the device that serves it.

On the CPU every arrangement is opened one after the other; a device has one runner, whose prompts go
through one graph or profile and whose steps through another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_export.parity.case_table import (
    CASES,
    GREEDY_DECODE,
    GREEDY_PREFILL,
    PORTABLE_CASES,
    PREFILL_WHOLE,
    SERVED,
)
from qwen_export.parity.cases import (
    Invariant,
    decode_cases,
    lowered_cases,
    prefill_cases,
    served_cases,
)
from qwen_export.parity.observations import Observations
from qwen_export.parity.prompts import Prompt
from qwen_export.parity.report import CPU
from qwen_export.progress import Progress
from qwen_runtime.backends.base import IntArray
from qwen_runtime.backends.cuda import opening as cuda_opening
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.proof import ENGINE_TOLERANCES, Claim, record_proof
from qwen_runtime.backends.registry import check_backend, open_runner
from qwen_runtime.backends.tensorrt import opening as tensorrt_opening
from qwen_runtime.bundle import Bundle
from qwen_runtime.comparison import TOLERANCES, Tolerance
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LoweredFolder, lowered_names

__all__ = ["CpuPlace", "DevicePlace", "Place", "open_place"]

Answers = tuple[list[IntArray], list[Invariant]]


class Place(Protocol):
    """Runs a bundle for a verification, once."""

    @property
    def backend(self) -> str:
        """What runs it: "onnxruntime" or "tensorrt"."""

    @property
    def device(self) -> str:
        """Where: "cpu", or the name of a GPU."""

    @property
    def compute_dtype(self) -> str:
        """Format of activations and caches."""

    @property
    def tolerance(self) -> Tolerance:
        """How far from the original it may answer."""

    @property
    def cases(self) -> tuple[str, ...]:
        """Keys of the cases it runs."""

    @property
    def max_context(self) -> int:
        """Tokens of the longest row it can hold."""

    @property
    def documents(self) -> tuple[Path, ...]:
        """Files that it reads beside those of the bundle's manifest."""

    def run(
        self, prompts: Sequence[Prompt], control: int, seen: Observations, progress: Progress
    ) -> Answers:
        """Run every case.

        Args:
            prompts: What is asked.
            control: Index of the prompt whose past is shifted on purpose.
            seen: Takes the logits.
            progress: Where to report cases.

        Returns:
            Greedy tokens of each prompt, and the invariants.
        """

    def accept(self, max_error: float, ties: int) -> None:
        """Remember that the bundle passed here.

        Args:
            max_error: Its largest logit error.
            ties: Tokens that differ where rounding decides.
        """

    def close(self) -> None:
        """Release what it holds."""


def open_place(bundle: Bundle, backend: str = "onnxruntime", device: str = CPU) -> Place:
    """Find what serves a bundle.

    Args:
        bundle: An opened bundle.
        backend: "onnxruntime" or "tensorrt".
        device: "cpu" or "cuda".

    Raises:
        RequestError: If the backend does not run on the device.
        BackendError: If the device, its driver or its libraries are missing.
        BundleError: If the bundle has nothing for it, or that is damaged.
    """
    if (backend, device) == ("onnxruntime", CPU):
        return CpuPlace.of(bundle)
    check_backend(backend, device)
    claim = _claim(bundle, backend)
    # A proof would refuse what is to be measured and reported here.
    return DevicePlace(
        open_runner(bundle, backend=backend, device=device, proved=False), bundle, claim
    )


def _claim(bundle: Bundle, backend: str) -> Claim:
    """What a GPU runs, its graphs or plan read and hashed."""
    find = tensorrt_opening.claim_of if backend == "tensorrt" else cuda_opening.claim_of
    claim = find(bundle)
    claim.check_hashes()
    return claim


@dataclass(frozen=True, slots=True)
class CpuPlace:
    """ONNX Runtime on the CPU: every graph, and a quantised bundle also as it is served."""

    bundle: Bundle
    lowered: LoweredFolder | None = None
    """Its graph for the CPU; None where it has only portable ones."""
    backend: str = "onnxruntime"
    device: str = CPU

    @classmethod
    def of(cls, bundle: Bundle) -> CpuPlace:
        """A bundle with its graph for the CPU, hashed.

        Raises:
            BundleError: If that graph is damaged, or was made for other weights.
        """
        if CPU not in lowered_names(bundle.path):
            return cls(bundle)
        lowered = LoweredFolder.open(bundle, CPU)
        lowered.check_hashes()
        return cls(bundle, lowered)

    @property
    def cases(self) -> tuple[str, ...]:
        """See `Place.cases`."""
        return PORTABLE_CASES if self.lowered is None else tuple(CASES)

    @property
    def documents(self) -> tuple[Path, ...]:
        """See `Place.documents`."""
        if self.lowered is None:
            return ()
        return self.lowered.path / LOWERED_FILE, self.lowered.graph_file("prefill")

    @property
    def compute_dtype(self) -> str:
        """See `Place.compute_dtype`."""
        return self.bundle.manifest.compute_dtype

    @property
    def tolerance(self) -> Tolerance:
        """See `Place.tolerance`."""
        return TOLERANCES[self.compute_dtype]

    @property
    def max_context(self) -> int:
        """See `Place.max_context`."""
        return self.bundle.manifest.max_context

    def run(
        self, prompts: Sequence[Prompt], control: int, seen: Observations, progress: Progress
    ) -> Answers:
        """See `Place.run`."""
        bundle, quantized = self.bundle, self.bundle.manifest.quantization is not None
        # One after the other: the packed weights are gone before both graphs are opened.
        with (
            progress("Running prefill", 4) as advance,
            closing(OnnxRuntimeRunner(bundle, exact=quantized, lowered=False)) as runner,
        ):
            answers, invariants = prefill_cases(runner, prompts, seen, advance)
        with (
            progress("Running decode", 2) as advance,
            closing(OnnxRuntimeRunner(bundle, decode_graph=True, exact=quantized)) as runner,
        ):
            invariants += decode_cases(runner, prompts, answers, control, seen, advance)
        if self.lowered is not None:
            with (
                progress("Running the graph for the CPU", 3) as advance,
                closing(OnnxRuntimeRunner(bundle, exact=quantized)) as runner,
            ):
                lowered_cases(runner, prompts, answers, seen, advance)
        if quantized:
            # fp32 activations meet quantised weights in another kernel for one token than for
            # many; what a caller sees is whether the kernels that serve differ.
            with (
                progress("Running as served", 2) as advance,
                closing(OnnxRuntimeRunner(bundle, packed_cache=False)) as runner,
            ):
                invariants += served_cases(runner, prompts, answers, seen, advance)
        return answers, invariants

    def accept(self, max_error: float, ties: int) -> None:
        """A bundle needs no proof on the CPU, where it was built and compared."""

    def close(self) -> None:
        """Nothing is held between calls."""


class DevicePlace:
    """A GPU, with the graphs or the engine that serve requests there.

    Args:
        runner: A `ModelRunner` that was not proved, and that knows its device; closed with this.
        bundle: The bundle it runs.
        claim: What it runs of it.
    """

    cases = tuple(key for key in PORTABLE_CASES if key != GREEDY_PREFILL)

    def __init__(self, runner: Any, bundle: Bundle, claim: Claim) -> None:
        self._runner, self._bundle, self._claim = runner, bundle, claim
        self.backend, self.compute_dtype = claim.backend, claim.compute_dtype
        self.documents = (claim.document,)
        self.device = str(runner.device.name)
        self.max_context = int(runner.limits.max_context)
        self.tolerance = ENGINE_TOLERANCES[claim.compute_dtype]

    def run(
        self, prompts: Sequence[Prompt], control: int, seen: Observations, progress: Progress
    ) -> Answers:
        """See `Place.run`. The logits of prompts and steps are also kept as those that are served."""
        runner = self._runner
        with progress(f"Running prefill on {self.device}", 4) as advance:
            answers, invariants = prefill_cases(
                runner, prompts, seen, advance, greedy=GREEDY_DECODE
            )
        with progress(f"Running decode on {self.device}", 1) as advance:
            invariants += decode_cases(
                runner, prompts, answers, control, seen, advance, batch=False
            )
        for row in range(len(prompts)):
            for case in (PREFILL_WHOLE, GREEDY_DECODE):
                seen.reuse(case, row, SERVED, row)
        return answers, invariants

    def accept(self, max_error: float, ties: int) -> None:
        """Record it as proved: loading it here asks no more."""
        record_proof(
            self._bundle, self._claim, self._runner.device, max_error=max_error, ties=ties
        )

    def close(self) -> None:
        """Release the device."""
        self._runner.close()
