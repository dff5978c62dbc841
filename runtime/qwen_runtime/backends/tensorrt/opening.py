"""From a bundle to a proven runner: which engine, which TensorRT, and is it right here."""

from __future__ import annotations

import importlib.util

from qwen_runtime.backends.tensorrt.nvidia import MODULES, load_seam
from qwen_runtime.backends.tensorrt.proof import prove
from qwen_runtime.backends.tensorrt.runner import TensorRtRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_file import EngineFolder, engine_names

__all__ = ["choose_engine", "open_tensorrt"]


def open_tensorrt(bundle: Bundle) -> TensorRtRunner:
    """Load a bundle's engine, and prove it where it was never run.

    Raises:
        BackendError: If TensorRT, a driver or a GPU is missing, the engine cannot run here, memory
            is short, or the engine answers otherwise than the original.
        BundleError: If there is no engine, it is damaged, or nothing to prove it with.
    """
    folder = choose_engine(bundle)
    seam = load_seam(folder.description.flavour)
    runner = TensorRtRunner(bundle, folder, seam)
    try:
        prove(runner, bundle, folder, runner.device, seam.cuda_versions()[0])
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
