"""From a bundle to a proven runner: which engine, which TensorRT, and is it right here."""

from __future__ import annotations

import importlib.util

from qwen_runtime.backends.proof import Claim, prove
from qwen_runtime.backends.tensorrt.nvidia import MODULES, load_seam
from qwen_runtime.backends.tensorrt.runner import TensorRtRunner
from qwen_runtime.backends.tensorrt.seam import Seam
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import ENGINE_FILE
from qwen_runtime.engine_file import EngineFolder, engine_names

__all__ = ["choose_engine", "claim_of", "open_tensorrt"]


def open_tensorrt(bundle: Bundle, *, proved: bool = True) -> TensorRtRunner:
    """Load a bundle's engine, and prove it where it was never run.

    Args:
        bundle: An opened bundle.
        proved: Prove it; otherwise it may answer wrongly.

    Raises:
        BackendError: If TensorRT, a driver or a GPU is missing, the engine cannot run here, memory
            is short, or the engine answers otherwise than the original.
        BundleError: If there is no engine, it is damaged, or nothing to prove it with.
    """
    folder = choose_engine(bundle)
    seam = load_seam(folder.description.flavour)
    runner = TensorRtRunner(bundle, folder, seam)
    if not proved:
        return runner
    try:
        prove(runner, bundle, _claim(folder, seam), runner.device)
    except BaseException:
        runner.close()
        raise
    return runner


def choose_engine(bundle: Bundle) -> EngineFolder:
    """The engine to run: one whose TensorRT is installed, TensorRT-RTX before the other.

    Raises:
        BundleError: If the bundle has none, or it is damaged.
    """
    names = engine_names(bundle.path)
    order = [name for name in MODULES if name in names]
    installed = [name for name in order if importlib.util.find_spec(MODULES[name]) is not None]
    chosen = (installed or order or names or tuple(MODULES))[0]
    return EngineFolder.open(bundle, chosen)


def claim_of(bundle: Bundle) -> Claim:
    """What a bundle's engine claims on this machine: that it answers like the original.

    Raises:
        BackendError: If its TensorRT is not installed.
        BundleError: If there is no engine, or it is damaged.
    """
    folder = choose_engine(bundle)
    return _claim(folder, load_seam(folder.description.flavour))


def _claim(folder: EngineFolder, seam: Seam) -> Claim:
    found = folder.description
    return Claim(
        document=folder.path / ENGINE_FILE,
        compute_dtype=found.compute_dtype,
        software=f"{found.flavour} {found.version}",
        check_hashes=folder.check_hashes,
        room="--capacity",
        advice=f"do not use this engine: build it again ({folder.rebuild_command}), or use "
        "backend='onnxruntime'",
        backend="tensorrt",
        driver=seam.cuda_versions()[0],
    )
