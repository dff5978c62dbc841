"""GPTQ over a checkpoint: what it is calibrated with, and in which order it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.errors import CheckpointError, ExportError
from qwen_export.quantization import QuantizationOptions, make_quantizer
from qwen_export.quantization.calibration import CalibratedQuantizer, read_calibration
from qwen_export.quantization.gptq import error_feedback, gptq

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
OPTIONS = QuantizationOptions(4, 32, "gptq")
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
"""The ones of the golden models whose inputs are whole blocks; mlp.down_proj stays as it is."""


@pytest.fixture(params=["qwen2_untied", "qwen3_untied"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(GOLDEN / "models" / request.param)


@pytest.fixture
def token_ids(rng: np.random.Generator, checkpoint: Checkpoint) -> npt.NDArray[np.int64]:
    return rng.integers(0, checkpoint.config.vocab_size, (11, 24))


def weight_of(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    return np.array(checkpoint.read(name).astype(np.float32).T)


def inputs_in_transformers(
    path: Path, changed: dict[str, Any], name: str, token_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """What transformers' whole model gives a linear module, [samples, K]."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(changed, strict=False)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(torch.from_numpy(token_ids))
    return seen[0].flatten(0, 1).double().numpy()


def test_every_layer_is_calibrated_with_the_quantised_ones_before_it(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]
) -> None:
    quantizer = CalibratedQuantizer(checkpoint, OPTIONS, token_ids)
    changed: dict[str, torch.Tensor] = {}
    for layer in range(2):
        done: dict[str, torch.Tensor] = {}
        for linear in LINEARS:
            module = f"model.layers.{layer}.{linear}"
            weight = weight_of(checkpoint, f"{module}.weight")
            # Two slices of outputs.
            parts = [
                quantizer(weight[:, :20], name=f"{module}.weight"),
                quantizer(weight[:, 20:], name=f"{module}.weight", start=20),
            ]
            codes = np.hstack([part.codes for part in parts])
            x = inputs_in_transformers(checkpoint.path, changed, module, token_ids)
            expected = gptq(weight, error_feedback(x.T @ x), 4, 32)
            assert (codes == expected.codes).mean() > 0.99
            values = np.hstack([part.dequantize() for part in parts])
            done[f"{module}.weight"] = torch.from_numpy(values.T.copy())
        changed |= done


def test_calibrating_with_the_original_layers_would_give_other_codes(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]
) -> None:
    quantizer = CalibratedQuantizer(checkpoint, OPTIONS, token_ids)
    for linear in LINEARS:
        name = f"model.layers.0.{linear}.weight"
        quantizer(weight_of(checkpoint, name), name=name)
    module = "model.layers.1.mlp.up_proj"
    weight = weight_of(checkpoint, f"{module}.weight")
    codes = quantizer(weight, name=f"{module}.weight").codes
    x = inputs_in_transformers(checkpoint.path, {}, module, token_ids)
    assert (codes == gptq(weight, error_feedback(x.T @ x), 4, 32).codes).mean() < 0.99


def test_a_layer_that_is_left_out_keeps_its_weights(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]
) -> None:
    module = "model.layers.1.self_attn.k_proj"
    weight = weight_of(checkpoint, f"{module}.weight")
    codes = CalibratedQuantizer(checkpoint, OPTIONS, token_ids)(
        weight, name=f"{module}.weight"
    ).codes
    x = inputs_in_transformers(checkpoint.path, {}, module, token_ids)
    assert (codes == gptq(weight, error_feedback(x.T @ x), 4, 32).codes).mean() > 0.99


def test_a_layer_left_behind_cannot_be_asked_for(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]
) -> None:
    quantizer = CalibratedQuantizer(checkpoint, OPTIONS, token_ids)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    quantizer(weight_of(checkpoint, second), name=second)
    with pytest.raises(ExportError, match="layer 0 came after layer 1; make a new quantizer"):
        quantizer(weight_of(checkpoint, first), name=first)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.0.mlp.other.weight", "model.norm.weight"]
)
def test_gptq_refuses_what_it_is_not_calibrated_for(
    name: str, checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]
) -> None:
    quantizer = CalibratedQuantizer(checkpoint, OPTIONS, token_ids)
    with pytest.raises(ExportError, match=f"^{name} cannot be quantised by gptq"):
        quantizer(np.ones((64, 8), np.float32), name=name)


def test_text_becomes_whole_rows_of_tokens(tmp_path: Path) -> None:
    from qwen_export.bundle import embedded_model

    checkpoint = open_checkpoint(embedded_model())
    text = tmp_path / "text.txt"
    text.write_text("<|im_start|>user\n你好<|im_end|>\n" * 300, encoding="utf-8")
    rows = read_calibration(checkpoint, text)
    assert rows.dtype == np.int64
    assert rows.shape[1] == 512
    assert rows.shape[0] >= 2
    assert rows[0, 0] == 4094  # <|im_start|> is one token
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(ExportError, match=r"must have at least 512 tokens, got \d+"):
        read_calibration(checkpoint, text)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ExportError, match="must be a UTF-8 file that can be read"):
        read_calibration(checkpoint, text)
    with pytest.raises(ExportError, match="must be a UTF-8 file that can be read"):
        read_calibration(checkpoint, tmp_path / "absent.txt")


def test_calibration_needs_a_tokenizer(tmp_path: Path, checkpoint: Checkpoint) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has no tokenizer, .* use --quantizer search$"):
        read_calibration(checkpoint, text)


def test_a_calibration_text_goes_with_gptq_and_with_nothing_else(checkpoint: Checkpoint) -> None:
    with pytest.raises(ExportError, match="method gptq needs a calibration text"):
        make_quantizer(OPTIONS, checkpoint=checkpoint)
    with pytest.raises(ExportError, match=r"is for method gptq only, got text\.txt for search"):
        make_quantizer(QuantizationOptions(4, 64, "search"), calibration=Path("text.txt"))
