"""Turn Qwen checkpoints into verified ONNX bundles.

    from qwen_export.bundle import build

    build("Qwen/Qwen2.5-0.5B-Instruct", Path("artifacts/qwen"))

Nothing is imported here: the command line stays fast, and reading a checkpoint needs no torch.
"""
