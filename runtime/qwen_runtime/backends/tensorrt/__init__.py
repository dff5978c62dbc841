"""TensorRT engines on an NVIDIA GPU: plans, device buffers and CUDA graphs, without torch.

::

    opening                           choose an engine, run it, prove it once on the device
       └─ runner                      what a caller asks for, split into calls a plan allows
            ├─ decoder                CUDA graphs of decode steps
            ├─ cache                  device memory
            └─ loaded ── contexts     plans and execution contexts
                 └─ seam ── nvidia    the only module that touches TensorRT and CUDA

Calls, buffers and the proof are shared with the other engine for GPUs: ``backends/device_*``.
None of it has been executed on a GPU: everything above ``seam`` is tested against a double that
keeps device memory in an array and computes with ONNX Runtime, ``nvidia`` only as far as it works
without a driver. See docs/tensorrt.md.
"""

from __future__ import annotations

from qwen_runtime.backends.tensorrt.opening import open_tensorrt
from qwen_runtime.backends.tensorrt.runner import TensorRtRunner

__all__ = ["TensorRtRunner", "open_tensorrt"]
