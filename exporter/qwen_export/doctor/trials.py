"""What is tried, each in a process of its own: ``python -m qwen_export.doctor.trials NAME``.

A trial prints a JSON object after every step, so that a crash costs the steps behind it alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CUDA_LIBRARIES", "TRIALS"]

Report = Callable[..., None]
"""Called with facts as keywords."""

CUDA_LIBRARIES = ("cudart", "cublas", "cublasLt", "cudnn", "cufft", "nvrtc")
"""What ONNX Runtime's CUDA provider loads, besides the driver."""


def _build(report: Report) -> None:
    """Build a model of one layer and compare it with PyTorch."""
    from qwen_export.bundle import BuildOptions, build

    with tempfile.TemporaryDirectory(prefix="qwen-export-doctor-") as folder:
        checkpoint = Path(folder) / "one-layer"
        _write_checkpoint(checkpoint)
        bundle = build(checkpoint, Path(folder) / "bundle", BuildOptions())
    report(parity=bundle.manifest.parity.status)


def _write_checkpoint(folder: Path) -> None:
    """A Qwen2 model of one layer and seeded weights."""
    import numpy as np
    from safetensors.numpy import save_file

    E, F, V, H = 16, 32, 32, 2
    D = E // H
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": E,
        "intermediate_size": F,
        "vocab_size": V,
        "num_hidden_layers": 1,
        "num_attention_heads": H,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    shapes = {
        "model.embed_tokens.weight": (V, E),
        "model.norm.weight": (E,),
        "model.layers.0.input_layernorm.weight": (E,),
        "model.layers.0.post_attention_layernorm.weight": (E,),
        f"{attention}q_proj.weight": (E, E),
        f"{attention}q_proj.bias": (E,),
        f"{attention}k_proj.weight": (D, E),
        f"{attention}k_proj.bias": (D,),
        f"{attention}v_proj.weight": (D, E),
        f"{attention}v_proj.bias": (D,),
        f"{attention}o_proj.weight": (E, E),
        f"{mlp}gate_proj.weight": (F, E),
        f"{mlp}up_proj.weight": (F, E),
        f"{mlp}down_proj.weight": (E, F),
    }
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")


def _onnxruntime(report: Report) -> None:
    """Compute an attention on the CPU, and on a GPU where ONNX Runtime was built for one."""
    import onnxruntime as ort

    providers = ort.get_available_providers()
    report(version=ort.__version__, providers=providers)
    _run_probe(ort, "CPUExecutionProvider")
    report(runs_cpu=True)
    if "CUDAExecutionProvider" in providers:
        _run_probe(ort, "CUDAExecutionProvider")
        report(runs_cuda=True)


def _run_probe(ort: Any, provider: str) -> None:
    import numpy as np

    from qwen_export.doctor.probe_graph import attention_model, expected_answer, probe_inputs

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if provider != "CPUExecutionProvider":
        # Without this a provider that fails to load is replaced by the CPU's, in silence.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(attention_model(), options, providers=[provider])
    (answer,) = session.run(["answer"], probe_inputs())
    difference = float(np.abs(answer - expected_answer()).max())
    if not difference < 1e-3:  # a GPU may round to TF32
        raise ArithmeticError(f"{provider} computes an attention wrongly, by {difference:.3g}")


def _tensorrt_rtx(report: Report) -> None:
    _tensorrt_flavour("tensorrt_rtx_bindings", report)


def _tensorrt(report: Report) -> None:
    _tensorrt_flavour("tensorrt", report)


def _tensorrt_flavour(module: str, report: Report) -> None:
    """Build an engine of one matrix product for every GPU it can name, and load it."""
    trt = importlib.import_module(module)
    known = dir(getattr(trt, "ComputeCapability", None))
    sms = sorted(int(name[2:]) for name in known if name[:2] == "SM" and name[2:].isdigit())
    report(version=trt.__version__, sms=sms)

    from qwen_export.targets.messages import Messages, new_logger

    messages = Messages()
    logger = new_logger(trt, messages)
    plan = _small_plan(trt, logger, sms)
    if plan is None:
        raise RuntimeError("; ".join(messages.errors) or "the builder made no engine")
    report(builds=True)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:
        raise RuntimeError("; ".join(messages.errors) or "the engine could not be loaded")
    report(runs=True)


def _small_plan(trt: Any, logger: Any, sms: list[int]) -> Any:
    import numpy as np

    builder = trt.Builder(logger)
    network = builder.create_network(0)
    # fp16, which SM 75 has too: it refuses a product of fp32.
    row = network.add_input("row", trt.float16, (1, 8))
    table = network.add_constant((8, 8), np.eye(8, dtype=np.float16)).get_output(0)
    plain = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(row, plain, table, plain).get_output(0))
    config = builder.create_builder_config()
    if sms:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    return builder.build_serialized_network(network, config)


def _cuda(report: Report) -> None:
    """Ask the driver for its GPUs, and load the CUDA libraries."""
    cu: Any = importlib.import_module("cuda.bindings.driver")
    pathfinder: Any = importlib.import_module("cuda.pathfinder")  # which the bindings require
    report(bindings=True)
    report(libraries=_load_libraries(pathfinder))

    def ask(name: str, *arguments: object) -> Any:
        status, *values = getattr(cu, name)(*arguments)
        if status != cu.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} answered {status.name}")
        return values[0] if values else None

    try:
        cuda_version = ask("cuDriverGetVersion")
    except pathfinder.DynamicLibNotFoundError:
        return  # no driver, which is no error
    report(source="cuda-bindings", cuda_version=cuda_version)
    ask("cuInit", 0)
    attribute = cu.CUdevice_attribute
    gpus = []
    for index in range(ask("cuDeviceGetCount")):
        device = ask("cuDeviceGet", index)
        major, minor = (
            ask("cuDeviceGetAttribute", which, device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = ask("cuDeviceGetName", 256, device).rstrip(b"\0").decode(errors="replace")
        memory = ask("cuDeviceTotalMem", device)
        gpus.append({"name": name, "sm": 10 * major + minor, "memory_bytes": int(memory)})
    report(gpus=gpus)


def _load_libraries(pathfinder: Any) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in CUDA_LIBRARIES:
        try:
            found[name] = str(pathfinder.load_nvidia_dynamic_lib(name).abs_path)
        except (pathfinder.DynamicLibNotFoundError, OSError, RuntimeError):
            found[name] = None
    return found


def _grammar(report: Report) -> None:
    """Compile a regular expression."""
    from llguidance import LLMatcher

    refused = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex("a+"))
    if refused:
        raise RuntimeError(refused)
    report(compiled=True)


def _generate(report: Report, bundle: str, backend: str, device: str) -> None:
    """Load a bundle and let it answer with a token."""
    from qwen_runtime.bench.model_clock import graph_of
    from qwen_runtime.llm import LLM

    with LLM(bundle, backend=backend, device=device) as llm:  # type: ignore[arg-type]  # it checks
        llm.generate([0], max_new_tokens=1, do_sample=False)
        report(generated=True, graph=graph_of(llm))


TRIALS: dict[str, Callable[..., None]] = {
    "build": _build,
    "cuda": _cuda,
    "generate": _generate,
    "grammar": _grammar,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}


def _main() -> None:
    # Libraries print to stdout too, so it is kept for the reports.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def report(**facts: object) -> None:
        print(json.dumps(facts), file=channel, flush=True)

    try:
        TRIALS[sys.argv[1]](report, *sys.argv[2:])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        report(error=_one_line(error), missing=name)


def _one_line(error: Exception) -> str:
    from qwen_export.errors import ExportError
    from qwen_runtime.errors import QwenRuntimeError

    text = " ".join(str(error).split())
    if text and isinstance(error, ExportError | QwenRuntimeError | ModuleNotFoundError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    _main()
