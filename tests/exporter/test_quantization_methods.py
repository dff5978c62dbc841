"""The numerics of weight-only quantisation: scales, codes, and error feedback."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export.errors import ExportError
from qwen_export.quantization import (
    QuantizationOptions,
    QuantizedTensor,
    code_range,
    columns_at_a_time,
    make_quantizer,
)
from qwen_export.quantization.blockwise import round_to_nearest, search
from qwen_export.quantization.gptq import DAMPING, error_feedback, gptq
from qwen_export.quantization.scales import fit_scales

Floats = npt.NDArray[np.float32]
Method = Callable[[Floats, int, int], QuantizedTensor]

BLOCKWISE = [round_to_nearest, search]
FORMATS = [(bits, block) for bits in (4, 8) for block in (32, 64, 128)]


@pytest.fixture
def weight(rng: np.random.Generator) -> Floats:
    """[256, 24] with some outliers."""
    values = rng.standard_normal((256, 24)).astype(np.float32)
    values[rng.random(values.shape) < 0.01] *= 8
    return values


def inputs_like_a_model(rng: np.random.Generator, features: int = 256) -> Floats:
    """Dependent inputs of unlike size, [2048, features]."""
    mixing = rng.standard_normal((features // 4, features))
    values = rng.standard_normal((2048, features // 4)) @ mixing
    values += rng.standard_normal(values.shape)
    return (values * np.exp(rng.standard_normal(features))).astype(np.float32)


def identity_method(weight: Floats, bits: int, block_size: int) -> QuantizedTensor:
    return gptq(weight, error_feedback(np.eye(len(weight))), bits, block_size)


def block_errors(weight: Floats, quantized: QuantizedTensor) -> npt.NDArray[np.float64]:
    """Squared error of every block, [K / block, N]."""
    error = (quantized.dequantize().astype(np.float64) - weight) ** 2
    return error.reshape(len(quantized.scales), quantized.block_size, -1).sum(axis=1)


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
@pytest.mark.parametrize("method", [*BLOCKWISE, identity_method])
def test_codes_and_scales_have_the_shapes_and_ranges_of_the_format(
    method: Method, bits: int, block_size: int, weight: Floats
) -> None:
    before = weight.copy()
    result = method(weight, bits, block_size)
    low, high = code_range(bits)
    assert result.codes.dtype == np.int8
    assert result.codes.shape == weight.shape
    assert result.codes.min() >= low
    assert result.codes.max() <= high
    assert result.scales.dtype == np.float32
    assert result.scales.shape == (256 // block_size, 24)
    assert (result.scales >= np.finfo(np.float32).tiny).all()
    assert (result.bits, result.block_size) == (bits, block_size)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_rounding_to_nearest_is_off_by_half_a_scale_at_most(
    bits: int, block_size: int, weight: Floats
) -> None:
    result = round_to_nearest(weight, bits, block_size)
    error = np.abs(result.dequantize() - weight)
    assert (error <= 0.5001 * np.repeat(result.scales, block_size, axis=0)).all()


def test_rounding_to_nearest_uses_the_whole_range_of_codes() -> None:
    block = np.linspace(-8, 7, 32, dtype=np.float32)[:, None]
    weight = np.hstack([block, -block])
    result = round_to_nearest(weight, 4, 32)
    np.testing.assert_allclose(result.scales, [[1, 8 / 7]], rtol=1e-6)
    assert (result.codes[:, 0].min(), result.codes[:, 0].max()) == (-8, 7)
    assert result.codes[:, 1].max() == 7


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_search_never_leaves_a_block_worse_and_most_of_them_better(
    bits: int, block_size: int, weight: Floats
) -> None:
    nearest = block_errors(weight, round_to_nearest(weight, bits, block_size))
    searched = block_errors(weight, search(weight, bits, block_size))
    assert (searched <= nearest * (1 + 1e-5)).all()
    assert (searched < nearest * 0.999).mean() > 0.9
    # The rounding of 8 bits leaves less to be gained.
    assert searched.sum() < (0.95 if bits == 4 else 0.99) * nearest.sum()


def test_search_comes_near_the_best_scale_of_a_fine_grid(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((32, 40)).astype(np.float32)
    found = block_errors(weight, search(weight, 4, 32))[0]
    top = np.abs(weight).max(axis=0)
    best = np.full(40, np.inf)
    for factor in np.linspace(0.3, 1.5, 3000):
        scale = top / 7 * factor
        codes = np.clip(np.rint(weight / scale), -8, 7)
        best = np.minimum(best, ((weight - codes * scale) ** 2).sum(axis=0))
    assert found.sum() < 1.01 * best.sum()


def test_importance_moves_the_error_to_where_it_costs_least(rng: np.random.Generator) -> None:
    block = rng.standard_normal((64, 200)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 100, 1).astype(np.float32)

    def cost(scales: Floats) -> float:
        error = block - np.clip(np.rint(block / scales), -8, 7) * scales
        return float((error**2 * importance[:, None]).sum())

    assert cost(fit_scales(block, 4, importance)) < 0.95 * cost(fit_scales(block, 4))


@pytest.mark.parametrize("method", [*BLOCKWISE, identity_method])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks_stay_zero_beside_others(method: Method, bits: int, weight: Floats) -> None:
    weight[32:64] = 0
    weight[:, 3] = 0
    result = method(weight, bits, 32)
    assert not result.dequantize()[32:64].any()
    assert not result.dequantize()[:, 3].any()
    np.testing.assert_array_equal(result.scales[:, 3], 1)


@pytest.mark.parametrize("method", BLOCKWISE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("factor", [3e38, 1e30, 1e-30, 1e-38, 1e-44])
def test_any_size_of_weight_is_coded_without_overflow(
    method: Method, bits: int, factor: float, rng: np.random.Generator
) -> None:
    pattern = rng.uniform(-1, 1, (32, 8)).astype(np.float32)
    weight = (pattern.astype(np.float64) * factor).astype(np.float32)
    result = method(weight, bits, 32)
    values = result.dequantize()
    assert np.isfinite(values).all()
    assert (result.scales >= np.finfo(np.float32).tiny).all()
    # One step of the codes, or of the smallest scale there is.
    step = max(factor / 2 ** (bits - 1), float(np.finfo(np.float32).tiny))
    assert np.abs(values.astype(np.float64) - weight).max() <= step


def textbook_gptq(weight: Floats, hessian: npt.NDArray[np.float64], scales: Floats) -> Floats:
    """The paper's algorithm with scales given: the inverse's Cholesky factor, input by input."""
    hessian = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left = weight.astype(np.float64)
    codes = np.empty(weight.shape)
    for k in range(len(weight)):
        scale = scales[k // (len(weight) // len(scales))]
        codes[k] = np.clip(np.rint(left[k] / scale), -8, 7)
        error = (left[k] - codes[k] * scale) / factor[k, k]
        left[k + 1 :] -= np.outer(factor[k, k + 1 :], error)
    return codes.astype(np.float32)


def test_gptq_gives_the_codes_of_the_papers_algorithm(
    rng: np.random.Generator, weight: Floats
) -> None:
    inputs = inputs_like_a_model(rng).astype(np.float64)
    hessian = inputs.T @ inputs
    result = gptq(weight, error_feedback(hessian), 4, 64)
    expected = textbook_gptq(weight, hessian, result.scales)
    # fp32 against fp64: a value halfway between two codes can fall to either side, and what
    # follows in its column then differs.
    assert (result.codes == expected).mean() > 0.99
    assert (result.codes == textbook_gptq(weight, np.eye(256), result.scales)).mean() < 0.9


def test_gptq_changes_outputs_on_other_inputs_least(
    rng: np.random.Generator, weight: Floats
) -> None:
    inputs = inputs_like_a_model(rng)
    seen, unseen = inputs[::2], inputs[1::2]
    feedback = error_feedback(seen.T @ seen)

    def error(quantized: QuantizedTensor) -> float:
        return float(((unseen @ (quantized.dequantize() - weight)) ** 2).sum())

    fed_back, searched = error(gptq(weight, feedback, 4, 32)), error(search(weight, 4, 32))
    assert fed_back < 0.6 * searched
    assert searched < error(round_to_nearest(weight, 4, 32))


def test_gptq_with_independent_inputs_is_the_search(weight: Floats) -> None:
    result, searched = identity_method(weight, 4, 32), search(weight, 4, 32)
    np.testing.assert_array_equal(result.codes, searched.codes)
    np.testing.assert_allclose(result.scales, searched.scales, rtol=1e-6)


@pytest.mark.parametrize("seen", [0, 1, 100])
def test_inputs_that_were_hardly_seen_are_no_obstacle(
    seen: int, rng: np.random.Generator, weight: Floats
) -> None:
    inputs = np.zeros((8, 256))
    inputs[:, :seen] = rng.standard_normal((8, seen))
    result = gptq(weight, error_feedback(inputs.T @ inputs), 4, 32)
    limit = 8 * np.abs(weight).max()
    assert np.abs(result.dequantize()).max() <= limit


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_slices_of_outputs_give_what_the_whole_weight_gives(method: str, weight: Floats) -> None:
    quantizer = make_quantizer(QuantizationOptions(4, 64, method))  # type: ignore[arg-type]
    whole = quantizer(weight, name="w")
    parts = [quantizer(weight[:, i : i + 7], name="w", start=i) for i in range(0, 24, 7)]
    np.testing.assert_array_equal(np.hstack([part.codes for part in parts]), whole.codes)
    np.testing.assert_array_equal(np.hstack([part.scales for part in parts]), whole.scales)


def test_a_transposed_view_is_quantised_like_its_copy(weight: Floats) -> None:
    view = np.ascontiguousarray(weight.T).T
    for method in BLOCKWISE:
        np.testing.assert_array_equal(method(view, 4, 32).codes, method(weight, 4, 32).codes)


def test_a_block_size_that_does_not_divide_names_the_ones_that_do() -> None:
    quantizer = make_quantizer(QuantizationOptions(4, 128, "rtn"))
    with pytest.raises(
        ExportError, match=r"^mlp\.w: a block size of 128 .* 192 inputs; .* of 32 or 64, or --keep"
    ):
        quantizer(np.ones((192, 2), np.float32), name="mlp.w")
    with pytest.raises(ExportError, match=r"40 inputs, but none of 32, 64, 128 does; --keep mlp"):
        quantizer(np.ones((40, 2), np.float32), name="mlp.w")


@pytest.mark.parametrize(("inputs", "block"), [(256, 128), (192, 64), (96, 32)])
def test_a_block_size_that_may_be_smaller_is_the_largest_that_divides(
    inputs: int, block: int
) -> None:
    quantizer = make_quantizer(QuantizationOptions(4, 128, "rtn", or_smaller=True))
    assert quantizer(np.ones((inputs, 2), np.float32), name="w").block_size == block
    with pytest.raises(ExportError, match=r"choose a block size of 32, or --keep w stores"):
        QuantizationOptions(4, 64, "rtn", or_smaller=False).block_size_of("w", 96)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float, weight: Floats) -> None:
    weight[7, 5] = bad
    with pytest.raises(ExportError, match=r"^layer\.w must hold finite numbers"):
        make_quantizer(QuantizationOptions(8, 32, "search"))(weight, name="layer.w")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, r"bits must be one of 4, 8, got 5"),
        ({"bits": True}, r"bits must be one of 4, 8, got True"),
        ({"bits": 4.0}, r"bits must be one of 4, 8, got 4\.0"),
        ({"block_size": 16}, r"block_size must be one of 32, 64, 128, got 16"),
        ({"method": "awq"}, r"method must be one of rtn, search, gptq, got 'awq'"),
    ],
)
def test_options_that_do_not_exist_are_refused_by_name(
    arguments: dict[str, object], message: str
) -> None:
    known = {"bits": 4, "block_size": 32, "method": "search"}
    with pytest.raises(ExportError, match=message):
        QuantizationOptions(**(known | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [32, 896, 4864, 18944])
def test_a_slice_of_columns_stays_near_its_memory(inputs: int) -> None:
    columns = columns_at_a_time(inputs)
    assert columns >= 64
    assert columns * inputs * 4 <= 64 << 20 or columns == 64
