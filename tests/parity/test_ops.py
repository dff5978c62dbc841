"""Rung 1: every operator of the decoder against its closed form in NumPy, in fp64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen_export.model import ops

Array = npt.NDArray[np.float64]
TOLERANCE = 2e-6
"""A few roundings to 24 bits of numbers around 1."""


def draw(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def wide(tensor: torch.Tensor) -> Array:
    return tensor.numpy().astype(np.float64)


def angles(length: int, head_dim: int, theta: float = 10000.0) -> Array:
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.asarray(np.arange(length)[:, None] * frequencies[None])


def rotated(x: Array, angle: Array) -> Array:
    """Each pair (i, i + D/2) as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def attended(q: Array, k: Array, v: Array, visible: npt.NDArray[np.bool_]) -> Array:
    """Softmax attention, one head and one query at a time."""
    groups = q.shape[1] // k.shape[1]
    y = np.zeros_like(q)
    for b, h, s in np.ndindex(q.shape[:3]):
        keys = k[b, h // groups][visible[b, s]]
        scores = keys @ q[b, h, s] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        y[b, h, s] = weights @ v[b, h // groups][visible[b, s]] / weights.sum()
    return y


def test_positions_continue_after_the_past_of_each_row() -> None:
    found = ops.positions(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 7]))
    assert found.tolist() == [[0, 1, 2], [7, 8, 9]]


def test_causal_mask_shows_each_token_its_past_and_itself() -> None:
    mask = ops.causal_mask(torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 1, 5, 4))
    assert mask.shape == (2, 1, 2, 5)
    for row, position in np.ndindex(2, 2):
        visible = mask[row, 0, position].tolist()
        assert visible == [column <= 2 * row + position for column in range(5)]


def test_rms_norm_divides_by_the_root_mean_square(rng: np.random.Generator) -> None:
    x, weight, eps = draw(rng, 2, 3, 8), draw(rng, 8), 1e-2
    x64 = wide(x)
    expected = wide(weight) * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(ops.rms_norm(x, weight, eps), expected, atol=TOLERANCE)
    without_eps = wide(weight) * x64 / np.sqrt((x64**2).mean(-1, keepdims=True))
    assert np.abs(wide(ops.rms_norm(x, weight, eps)) - without_eps).max() > 100 * TOLERANCE


def test_rotary_embedding_turns_pairs_half_a_head_apart(rng: np.random.Generator) -> None:
    x, position_ids = draw(rng, 2, 3, 4, 8), torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    table = angles(9, 8)
    cos, sin = (torch.from_numpy(f(table).astype(np.float32)) for f in (np.cos, np.sin))
    found = wide(ops.rotary_embedding(x, cos, sin, position_ids))
    at = table[position_ids.numpy()][:, None]
    np.testing.assert_allclose(found, rotated(wide(x), at), atol=TOLERANCE)
    assert np.abs(found - rotated(wide(x), -at)).max() > 0.1, "swapped halves"
    wrong_theta = angles(9, 8, theta=100000.0)[position_ids.numpy()][:, None]
    assert np.abs(found - rotated(wide(x), wrong_theta)).max() > 0.1, "wrong theta"


def test_tensor_scatter_writes_after_the_past_and_nowhere_else(rng: np.random.Generator) -> None:
    cache, update = draw(rng, 2, 1, 6, 4), draw(rng, 2, 1, 2, 4)
    found = ops.tensor_scatter(cache, update, torch.tensor([1, 4]))
    expected = cache.clone()
    expected[0, :, 1:3], expected[1, :, 4:6] = update[0], update[1]
    assert torch.equal(found, expected)
    assert not torch.equal(found, ops.tensor_scatter(cache, update, torch.tensor([0, 4])))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_attention_is_softmax_over_visible_slots(
    rng: np.random.Generator, kv_heads: int
) -> None:
    q, k, v = draw(rng, 2, 4, 3, 8), draw(rng, 2, kv_heads, 6, 8), draw(rng, 2, kv_heads, 6, 8)
    position_ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = ops.causal_mask(position_ids, k)
    found = wide(ops.cached_attention(q, k, v, mask, position_ids[:, -1] + 1))
    visible = np.arange(6) <= position_ids.numpy()[:, :, None]
    np.testing.assert_allclose(found, attended(wide(q), wide(k), wide(v), visible), atol=TOLERANCE)
    one_more = np.arange(6) <= position_ids.numpy()[:, :, None] + 1
    assert np.abs(found - attended(wide(q), wide(k), wide(v), one_more)).max() > 0.01


def test_heads_split_and_merge_are_inverse_and_keep_a_head_together(
    rng: np.random.Generator,
) -> None:
    x = draw(rng, 2, 3, 8)
    heads = ops.split_heads(x, 4)
    assert heads.shape == (2, 2, 3, 4)
    assert torch.equal(heads[1, 1, 2], x[1, 2, 4:])
    assert torch.equal(ops.merge_heads(heads), x)


def test_gather_positions_picks_rows_of_each_batch_entry(rng: np.random.Generator) -> None:
    x = draw(rng, 2, 4, 3)
    found = ops.gather_positions(x, torch.tensor([[3], [1]]))
    assert torch.equal(found, torch.stack((x[0, 3:], x[1, 1:2])))


def test_tied_head_multiplies_by_the_table_transposed(rng: np.random.Generator) -> None:
    x, table = draw(rng, 2, 3, 8), draw(rng, 5, 8)
    found = ops.tied_lm_head(x, table)
    np.testing.assert_allclose(found, wide(x) @ wide(table).T, atol=2 * TOLERANCE)
