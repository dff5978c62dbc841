"""An engine's plans on the device: refused where they cannot run, checked, and ready for contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_runtime.backends.device_calls import CallLimits
from qwen_runtime.backends.device_check import require_gpu
from qwen_runtime.backends.tensorrt.cache import CacheLayout
from qwen_runtime.backends.tensorrt.seam import Seam, TensorInfo
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import EngineProfile, Phase, PlanEntry
from qwen_runtime.engine_file import EngineFolder, refusal
from qwen_runtime.errors import BackendError, BundleError

__all__ = ["LoadedEngine", "PhasePlan"]

_ELEMENT_BYTES = {"BF16": 2, "HALF": 2, "FLOAT": 4}
"""Types a cache may have, by TensorRT's name."""
_TYPES = {
    "input_ids": "INT64",
    "past_lengths": "INT64",
    "logits_indices": "INT64",
    "logits": "FLOAT",
}
_REASONS = {
    "MALFORMED_ENGINE": "the file is damaged",
    "VERSION_MISMATCH": "another release of TensorRT built it",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: update cuda-bindings",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "CUDA_ERROR": "CUDA does not work here: see `qwen-export doctor`",
}
"""TensorRT's reasons against a plan, in a user's words."""
_NOT_REBUILT = ("OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR")
"""Those that a new plan would not change."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What runs a phase."""

    engine: int
    """Handle of the deserialised plan."""
    profile: int
    tensors: tuple[TensorInfo, ...]
    limits: CallLimits
    """The largest call of its profile."""

    def has(self, name: str) -> bool:
        """Whether the plan has an input or output of that name."""
        return any(tensor.name == name for tensor in self.tensors)


class LoadedEngine:
    """Plans deserialised, each once.

    Attributes:
        device: The GPU.
        phases: What runs prefill and what decode; one plan may serve both.
        layout: Of the caches, which both share.
        scratch_bytes: Scratch memory that serves either phase.

    Args:
        seam: TensorRT and CUDA.
        bundle: The bundle that the engine lies in.
        folder: The engine.

    Raises:
        BackendError: If there is no GPU, or the engine cannot run on it.
        BundleError: If a plan is damaged or is not what engine.json says.
    """

    def __init__(self, seam: Seam, bundle: Bundle, folder: EngineFolder) -> None:
        self._seam, self._folder = seam, folder
        self.device = require_gpu(seam, "run TensorRT engines", "use backend='onnxruntime'")
        reason = refusal(folder, seam.version, self.device.sm)
        if reason is not None:
            raise BackendError(reason)
        self._engines: dict[str, int] = {}
        try:
            self.phases: Mapping[Phase, PhasePlan] = {
                "prefill": self._phase("prefill", bundle),
                "decode": self._phase("decode", bundle),
            }
            self.layout = self._shared_layout(bundle)
            self.scratch_bytes = max(
                seam.scratch_bytes(plan.engine, plan.profile) for plan in self.phases.values()
            )
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The engine's folder, for messages."""
        return str(self._folder.path)

    def close(self) -> None:
        """Destroy the plans; their contexts must be gone."""
        while self._engines:
            self._seam.free_engine(self._engines.popitem()[1])

    def _phase(self, phase: Phase, bundle: Bundle) -> PhasePlan:
        plan, index = self._folder.description.profile(phase)
        if plan.file not in self._engines:
            self._engines[plan.file] = self._load(plan)
        engine = self._engines[plan.file]
        found = PhasePlan(
            engine,
            index,
            self._seam.tensors(engine),
            _limits(plan.profiles[index], self._folder.description.capacity, bundle),
        )
        self._check_tensors(found, plan, bundle)
        self._check_aliases(found)
        self._check_profile(found, plan.profiles[index])
        return found

    def _load(self, plan: PlanEntry) -> int:
        path = self._folder.plan_file(plan)
        reasons = self._seam.validity(path)
        if reasons:
            known = [_REASONS.get(reason, reason) for reason in reasons]
            advice = "" if set(reasons) <= set(_NOT_REBUILT) else f"; {self._rebuild()}"
            raise BundleError(f"{path} cannot run here: {', and '.join(known)}{advice}", path=path)
        free = self._seam.free_bytes()
        try:
            return self._seam.load(path)
        except BackendError as error:
            needed = plan.weight_bytes or plan.num_bytes
            if needed > free:
                raise BackendError(
                    f"{path} needs {needed} bytes of GPU memory for its weights, got {free} free "
                    "ones; free GPU memory, or build the bundle with --precision int8 or int4"
                ) from error
            raise BackendError(f"{error}; {self._rebuild()}") from error

    def _check_tensors(self, phase: PhasePlan, plan: PlanEntry, bundle: Bundle) -> None:
        graph = bundle.manifest.graphs[plan.graph]
        for is_input, entries in ((True, graph.inputs), (False, graph.outputs)):
            wanted = {entry.name for entry in entries}
            found = {each.name for each in phase.tensors if each.is_input == is_input}
            if wanted != found:
                kind = "inputs" if is_input else "outputs"
                raise self._mismatch(
                    f"{plan.file} must have the {kind} of {graph.file}, but differs in "
                    f"{', '.join(sorted(wanted ^ found))}"
                )
        for tensor in phase.tensors:
            expected = _TYPES.get(tensor.name)
            if expected is not None and tensor.dtype != expected:
                raise self._mismatch(
                    f"{plan.file}: {tensor.name} must be {expected}, got {tensor.dtype}"
                )

    def _check_aliases(self, phase: PhasePlan) -> None:
        """Each cache output must be its input, or every step would lose what it wrote."""
        for tensor in phase.tensors:
            if tensor.is_input or tensor.name == "logits":
                continue
            wanted = self._folder.description.aliases.get(tensor.name)
            found = self._seam.alias(phase.engine, tensor.name)
            if wanted is None or wanted != found:
                raise self._mismatch(
                    f"{tensor.name} must be written in place of "
                    f"{wanted or 'an input'}, but shares the memory of {found or 'none'}"
                )

    def _check_profile(self, phase: PhasePlan, profile: EngineProfile) -> None:
        limits = phase.limits
        largest = {"input_ids": (limits.max_batch, limits.max_sequence)}
        if phase.has("logits_indices"):
            largest["logits_indices"] = (limits.max_batch, limits.max_num_logits)
        for name, wanted in largest.items():
            low = self._seam.min_shape(phase.engine, name, phase.profile)
            high = self._seam.max_shape(phase.engine, name, phase.profile)
            if low != (1, 1) or high != wanted:
                raise self._mismatch(
                    f"the {profile.name} profile must take {name} from (1, 1) to {wanted}, got "
                    f"{low} to {high}"
                )

    def _shared_layout(self, bundle: Bundle) -> CacheLayout:
        prefill, decode = (self._layout(plan, bundle) for plan in self.phases.values())
        if prefill != decode:
            raise self._mismatch("the plans for prefill and decode must have the same caches")
        return prefill

    def _layout(self, phase: PhasePlan, bundle: Bundle) -> CacheLayout:
        model = bundle.manifest.model
        heads, head_dim = model.num_key_value_heads, model.head_dim
        shape = (-1, heads, self._folder.description.capacity, head_dim)
        aliases = self._folder.description.aliases
        caches = [each for each in phase.tensors if each.name in {*aliases, *aliases.values()}]
        types = sorted({cache.dtype for cache in caches})
        if len(types) != 1 or types[0] not in _ELEMENT_BYTES:
            raise self._mismatch(
                f"all caches must have one type of {', '.join(_ELEMENT_BYTES)}, got "
                f"{', '.join(types)}"
            )
        for cache in caches:
            if cache.shape != shape:
                raise self._mismatch(f"{cache.name} must be {shape}, got {cache.shape}")
        return CacheLayout(
            outputs={source: output for output, source in aliases.items()},
            heads=heads,
            capacity=shape[2],
            token_bytes=head_dim * _ELEMENT_BYTES[types[0]],
        )

    def _rebuild(self) -> str:
        return f"build it again: {self._folder.rebuild_command}"

    def _mismatch(self, what: str) -> BundleError:
        return BundleError(f"{self.name}: {what}; {self._rebuild()}", path=self._folder.path)


def _limits(profile: EngineProfile, capacity: int, bundle: Bundle) -> CallLimits:
    sizes = profile.sizes
    return CallLimits(
        # Positions past max_context have no rotary angles.
        capacity=min(capacity, bundle.manifest.max_context),
        max_batch=sizes["batch"].max,
        max_sequence=sizes["sequence"].max if "sequence" in sizes else 1,
        max_num_logits=sizes["num_logits"].max if "num_logits" in sizes else 1,
    )
