"""What ONNX Runtime's CPU kernels make of a prompt: forms of matrix product, and settings.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --bundle artifacts/my-model-int8

Without a bundle: products of the shapes of Qwen2.5-0.5B, in every form that keeps rows independent
of their neighbours, and in CPU time of one thread, which other work on the machine disturbs least.
With one: prefill under settings of session and runner, each paired with the default, and on the
portable graph where the bundle has one for the CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import median_ratio, pairs, report
from onnx import TensorProto, helper, numpy_helper

SHAPES = {"up": (896, 4864), "down": (4864, 896), "output": (896, 896)}
"""Inputs and outputs of the layer's products."""
BLOCKS = (32, 64, 128, 256)
CHUNKS = (128, 256, 1024, 2048)
LEVEL = "session.qdq_matmulnbits_accuracy_level"
SESSION_SETTINGS = {
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning stops with the run": {"session.force_spinning_stop": "1"},
    "dynamic_block_base 4": {"session.dynamic_block_base": "4"},
}
Form = tuple[bytes, dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 900])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    if args.bundle is None:
        report(_products(args.runs), args.as_json)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["QWEN_EXPORT_CACHE"] = scratch
            report(_settings(args), args.as_json)


def _products(runs: int) -> dict[str, object]:
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    result: dict[str, object] = {"unit": "multiply-adds per second and thread, 1e9"}
    for layer, (inputs, outputs) in SHAPES.items():
        sessions = {}
        for name, (model, config) in _forms(inputs, outputs, rng).items():
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            for key, value in config.items():
                options.add_session_config_entry(key, value)
            sessions[name] = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
        for tokens in (1, 128, 512):
            x = rng.normal(size=(tokens, inputs)).astype(np.float32)
            repeat = 40 if tokens == 1 else 1
            seconds: dict[str, list[float]] = {name: [] for name in sessions}
            for _ in range(runs):
                for name, session in sessions.items():
                    started = time.process_time()
                    for _ in range(repeat):
                        session.run(None, {"x": x})
                    seconds[name].append((time.process_time() - started) / repeat)
            for name, measured in seconds.items():
                rate = tokens * inputs * outputs / statistics.median(measured) / 1e9
                result[f"{layer}, {tokens} tokens: {name}"] = rate
    return result


def _forms(inputs: int, outputs: int, rng: np.random.Generator) -> dict[str, Form]:
    codes = rng.integers(-127, 128, (inputs, outputs), np.int8)
    weight = numpy_helper.from_array(codes.astype(np.float32) * np.float32(1e-4), "w")
    product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    forms: dict[str, Form] = {"fp32": (_model(product, [weight], inputs, outputs), {})}
    for bits in (8, 4):
        for block in (block for block in BLOCKS if inputs % block == 0):
            model = _blockwise(codes, bits, block)
            for level in ("4", "0") if block == 64 else ("4",):
                forms[f"int{bits}, block {block}, level {level}"] = (model, {LEVEL: level})
    forms["int8, a scale a token and a column"] = (_rowwise(codes), {})
    return forms


def _model(nodes: list[Any], tensors: list[Any], inputs: int, outputs: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())


def _blockwise(codes: np.ndarray, bits: int, block: int) -> bytes:
    """DequantizeLinear and MatMul, which become MatMulNBits."""
    inputs, outputs = codes.shape
    stored = numpy_helper.from_array(codes, "codes")
    if bits == 4:
        low, high = (codes.reshape(-1)[start::2] >> 4 & 15 for start in (0, 1))
        stored = TensorProto(name="codes", data_type=TensorProto.INT4, dims=codes.shape)
        stored.raw_data = (low | high << 4).astype(np.uint8).tobytes()
    scales = numpy_helper.from_array(
        np.full((inputs // block, outputs), 1e-4, np.float32), "scales"
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return _model(nodes, [stored, scales], inputs, outputs)


def _rowwise(codes: np.ndarray) -> bytes:
    """Tokens rounded by a scale each, an integer product, and both scales on its result."""
    nodes = [
        helper.make_node("ReduceMax", ["x", "last"], ["highest"], keepdims=1),
        helper.make_node("ReduceMin", ["x", "last"], ["lowest"], keepdims=1),
        helper.make_node("Neg", ["lowest"], ["depth"]),
        helper.make_node("Max", ["highest", "depth", "tiny"], ["reach"]),
        helper.make_node("Mul", ["reach", "step"], ["token_scales"]),
        helper.make_node("Reshape", ["token_scales", "flat"], ["row_scales"]),
        helper.make_node("Shape", ["row_scales"], ["rows"]),
        helper.make_node("Expand", ["zeros", "rows"], ["row_zeros"]),
        helper.make_node("QuantizeLinear", ["x", "row_scales", "row_zeros"], ["q"], axis=0),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["q", "codes", "one", "scales", "zero"],
            ["product"],
            domain="com.microsoft",
        ),
        helper.make_node("Mul", ["product", "token_scales"], ["y"]),
    ]
    values = {
        "last": np.array([-1]),
        "tiny": np.float32([1e-12]),
        "step": np.float32([1 / 127]),
        "flat": np.array([-1]),
        "zeros": np.array([128], np.uint8),
        "zero": np.array(128, np.uint8),
        "one": np.array(1, np.float32),
        "scales": np.full(codes.shape[1], 1e-4, np.float32),
        "codes": codes,
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    return _model(nodes, tensors, *codes.shape)


def _settings(args: argparse.Namespace) -> dict[str, object]:
    from qwen_runtime.backends import onnxruntime as backend
    from qwen_runtime.backends import sessions
    from qwen_runtime.bundle import Bundle

    bundle = Bundle.open(args.bundle)

    def open_runner(config: dict[str, str], **arguments: Any) -> backend.OnnxRuntimeRunner:
        plain = sessions._options

        def options(*known: Any, **more: Any) -> Any:
            made = plain(*known, **more)
            for key, value in config.items():
                made.add_session_config_entry(key, value)
            return made

        with mock.patch.object(sessions, "_options", options):
            return backend.OnnxRuntimeRunner(bundle, threads=args.threads, **arguments)

    def prefill(runner: backend.OnnxRuntimeRunner, length: int, chunk: int) -> Callable[[], float]:
        ids = np.random.default_rng(0).integers(0, runner.limits.vocab_size, length)

        def measure() -> float:
            with mock.patch.object(backend, "PREFILL_CHUNK", chunk):
                started = time.perf_counter()
                runner.prefill([0], [ids], [0], [1])
                return time.perf_counter() - started

        runner.allocate(1, max(args.prompts))
        measure()
        return measure

    open_runner({}).close()  # packs what the others then map
    default = open_runner({})
    chunk = backend.PREFILL_CHUNK
    portable = {}
    if default.graph != bundle.manifest.graphs["prefill"].file:
        open_runner({}, lowered=False).close()
        portable = {"portable graph": lambda: (open_runner({}, lowered=False), chunk)}
    others: dict[str, Callable[[], tuple[backend.OnnxRuntimeRunner, int]]] = {
        **portable,
        **{f"chunk {size}": lambda size=size: (default, size) for size in CHUNKS},
        **{
            name: lambda config=config: (open_runner(config), chunk)
            for name, config in SESSION_SETTINGS.items()
        },
        "exact": lambda: (open_runner({}, exact=True), chunk),
    }
    result: dict[str, object] = {
        "bundle": str(args.bundle),
        "graph": default.graph,
        "threads": args.threads,
    }
    for name, prepare in others.items():
        runner, size = prepare()
        for length in args.prompts:
            if size >= length and size != chunk and chunk >= length:
                continue  # one chunk either way
            ours, theirs = prefill(runner, length, size), prefill(default, length, chunk)
            measured = pairs(ours, theirs, args.runs)
            best = length / min(pair[1] for pair in measured)
            result[f"prompt {length}: default (tok/s)"] = best
            result[f"prompt {length}: {name} / default"] = median_ratio(measured)
        if runner is not default:
            runner.close()
    return result


if __name__ == "__main__":
    main()
