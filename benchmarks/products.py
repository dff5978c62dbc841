"""What a decode step's quantised products take alone: the least for any runtime with this kernel.

    python benchmarks/products.py --bundle DIR [--genai DIR --peers-python P] [--rounds 8] [--json]

A session that holds nothing but the products of the bundle's graph for the CPU (MatMulNBits of the
same sizes, random codes, one row) runs in turn with whole steps of one row after 128 tokens: ours
and, where given, those of onnxruntime-genai with a model of its builder, in a process of its own.
`peers/run.py` makes both models. Milliseconds are medians, ratios those of pairs, with the lowest
and the highest. Run it on an idle machine; it warns when the load average says that it is not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from common import pairs, report, warn_if_busy
from onnx import helper, numpy_helper

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bandwidth import read_bandwidth
from qwen_runtime.bundle import Bundle

PEERS = Path(__file__).parent / "peers"
sys.path.insert(1, str(PEERS))

from process import Process  # noqa: E402 - needs the path above

LENGTH, STEPS = 128, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--genai", type=Path, help="a folder of onnxruntime-genai's builder")
    parser.add_argument("--peers-python", type=Path, default=PEERS / ".venv" / "bin" / "python")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    if args.genai and not args.peers_python.exists():
        parser.error(f"{args.peers_python} is missing: run benchmarks/peers/setup")
    warn_if_busy()
    runner = OnnxRuntimeRunner(Bundle.open(args.bundle), threads=args.threads)
    if not runner.graph.startswith("lowered"):
        sys.exit(f"{args.bundle} has no graph for the CPU: qwen-export engine --target cpu")
    alone = Products(args.bundle / runner.graph, args.threads)
    bandwidth = read_bandwidth(args.threads)
    result: dict[str, object] = {"bundle": args.bundle.name, "threads": args.threads}
    with ExitStack() as stack:
        steps = {"ours": lambda: our_step(runner)}
        if args.genai:
            python = str(args.peers_python.absolute())
            command = [python, str(PEERS / "worker.py"), "genai", str(args.genai)]
            command += ["--threads", str(args.threads), "--capacity", str(LENGTH + STEPS)]
            genai = Process([*command, "--settings", '{"chunk_size": null}'], "genai")
            stack.enter_context(genai)
            steps[args.genai.name] = lambda: (
                1e3 * float(genai.ask("run", length=LENGTH, steps=STEPS)["step_s"])
            )
        for name, step in steps.items():
            result |= compare(name, alone.step, step, args.rounds)
    took = statistics.median(alone.step() for _ in range(args.rounds))
    result["bytes of the products, MB"] = round(alone.num_bytes / 1e6)
    result["their share of the read bandwidth"] = (
        f"{alone.num_bytes / (1e-3 * took) / bandwidth:.0%} of {bandwidth / 1e9:.1f} GB/s"
    )
    report(result, args.as_json)


def compare(
    name: str, products: Callable[[], float], step: Callable[[], float], rounds: int
) -> dict[str, object]:
    """Milliseconds of both, and how many times the products' time a whole step takes."""
    products(), step()
    measured = pairs(products, step, rounds)
    alone, whole = (statistics.median(each) for each in zip(*measured, strict=True))
    ratios = [b / a for a, b in measured]
    return {
        f"a step of {name}, ms": f"{whole:.1f}, products alone {alone:.1f}, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    }


def our_step(runner: OnnxRuntimeRunner) -> float:
    """Milliseconds of a decode step of one row."""
    runner.allocate(1, LENGTH + STEPS)
    runner.truncate(0, LENGTH)
    started = time.perf_counter()
    for _ in range(STEPS):
        runner.decode([0], [5])
    return 1e3 * (time.perf_counter() - started) / STEPS


class Products:
    """A session over the products of a graph for the CPU, with random codes and scales.

    Args:
        graph: Whose MatMulNBits to take.
        threads: Of the session.
    """

    def __init__(self, graph: Path, threads: int) -> None:
        rng = np.random.default_rng(0)
        nodes, weights, outputs = [], [], []
        features: set[int] = set()
        for number, node in enumerate(onnx.load(graph, load_external_data=False).graph.node):
            if node.op_type != "MatMulNBits":
                continue
            size = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            features.add(size["K"])
            blocks = size["K"] // size["block_size"]
            codes = (size["N"], blocks, size["block_size"] * size["bits"] // 8)
            scales = rng.uniform(0.001, 0.01, (size["N"], blocks)).astype(np.float32)
            names = [f"x{size['K']}", f"codes{number}", f"scales{number}"]
            weights += [
                numpy_helper.from_array(rng.integers(0, 256, codes, np.uint8), names[1]),
                numpy_helper.from_array(scales, names[2]),
            ]
            output = helper.make_tensor_value_info(f"y{number}", 1, [1, size["N"]])
            outputs.append(output)
            nodes.append(
                helper.make_node(node.op_type, names, [output.name], domain=node.domain, **size)
            )
        inputs = [helper.make_tensor_value_info(f"x{k}", 1, [1, k]) for k in sorted(features)]
        model = helper.make_model(
            helper.make_graph(nodes, "products", inputs, outputs, weights),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        self.num_bytes = sum(len(weight.raw_data) for weight in weights)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"]
        )
        self._bound = self._session.io_binding()
        self._values = {
            value.name: np.ones(
                [d.dim_value for d in value.type.tensor_type.shape.dim], np.float32
            )
            for value in (*inputs, *outputs)
        }
        for value in inputs:
            self._bound.bind_cpu_input(value.name, self._values[value.name])
        for value in outputs:
            data = self._values[value.name]
            self._bound.bind_output(value.name, "cpu", 0, np.float32, data.shape, data.ctypes.data)

    def step(self) -> float:
        """Milliseconds of all products for one row."""
        started = time.perf_counter()
        for _ in range(STEPS):
            self._session.run_with_iobinding(self._bound)
        return 1e3 * (time.perf_counter() - started) / STEPS


if __name__ == "__main__":
    main()
