"""ONNX Runtime on an NVIDIA GPU: lowered graphs, device caches and CUDA graphs, without torch.

::

    opening                        is there a GPU; open, and prove once on it
       └─ runner                   what a caller asks for, split into calls the graphs allow
            ├─ decoder ── blocks   fixed buffers and CUDA graphs of decode steps
            ├─ choices             best tokens and highest logits, brought instead of whole rows
            ├─ cache               keys and values on the device
            ├─ sessions            the graphs, checked, on one stream
            └─ weights ── dlpack                once on the device, for both graphs
                 └─ seam ── nvidia              the only module that touches CUDA

None of it has been executed on a GPU: everything above ``seam`` is tested with the host's memory as
the device and ONNX Runtime's CPU provider in real sessions, ``nvidia`` only as far as it works
without a driver. See docs/cuda.md.
"""

from __future__ import annotations

from qwen_runtime.backends.cuda.opening import open_cuda
from qwen_runtime.backends.cuda.runner import CudaRunner

__all__ = ["CudaRunner", "open_cuda"]
