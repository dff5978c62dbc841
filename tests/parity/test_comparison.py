"""The metric that build and check share."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_runtime.comparison import TOLERANCES, compare, tolerance_for

REFERENCE = np.array([[4.0, 3.0, -8.0, 0.0]], np.float32)


def test_error_is_the_largest_difference_over_the_largest_reference() -> None:
    found = compare(REFERENCE + np.float32([0, 0, 0, 0.5]), REFERENCE, tolerance=0.1)
    assert found.differences.tolist() == [0.5]
    assert found.errors.tolist() == [0.5 / 8]
    assert not found.failed.any()


def test_error_above_the_tolerance_fails() -> None:
    moved = REFERENCE + np.float32([0, 0, 0, 0.5])
    assert compare(moved, REFERENCE, tolerance=0.06).failed.tolist() == [True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_fails_whatever_the_tolerance(bad: float) -> None:
    broken = REFERENCE.copy()
    broken[0, 3] = bad
    found = compare(broken, REFERENCE, tolerance=1e30)
    assert found.errors.tolist() == [np.inf]
    assert found.failed.tolist() == [True]


def test_another_token_is_a_tie_where_the_two_best_are_as_close_as_rounding() -> None:
    reference = np.array([[4.0, 3.9999, -8.0]], np.float32)
    swapped = np.array([[3.9999, 4.0, -8.0]], np.float32)
    found = compare(swapped, reference, tolerance=1e-4)
    assert (found.tokens[0], found.reference_tokens[0]) == (1, 0)
    assert found.ties.tolist() == [True]
    assert not found.failed.any()


def test_another_token_with_an_error_above_the_tolerance_is_no_tie() -> None:
    swapped = np.array([[3.0, 4.0, -8.0, 0.0]], np.float32)
    found = compare(swapped, REFERENCE, tolerance=1e-4)
    assert found.ties.tolist() == [False]
    assert found.failed.tolist() == [True]


def test_another_token_is_no_tie_where_the_two_best_are_far_apart() -> None:
    found = compare(REFERENCE, REFERENCE, tolerance=1e-4, tokens=np.array([3]))
    assert found.errors.tolist() == [0.0]
    assert found.failed.tolist() == [True]


def test_scale_of_the_whole_vocabulary_counts_where_only_the_best_are_known() -> None:
    best = REFERENCE[:, :2]
    moved = best + np.float32(0.4)
    assert compare(moved, best, tolerance=1.0).errors[0] == pytest.approx(0.1)
    scales = np.array([8.0], np.float32)
    assert compare(moved, best, tolerance=1.0, scales=scales).errors[0] == pytest.approx(0.05)


def test_a_reference_of_zeros_allows_no_difference() -> None:
    zeros = np.zeros((1, 4), np.float32)
    assert not compare(zeros, zeros, tolerance=1e-4).failed.any()
    assert compare(zeros + np.float32(1e-6), zeros, tolerance=1e-4).failed.all()


def test_tolerance_grows_with_the_square_root_of_the_depth() -> None:
    assert tolerance_for("fp32", 1) == tolerance_for("fp32", 8) == 1e-4
    assert tolerance_for("fp32", 32) == pytest.approx(2e-4)
    assert all(tolerance.reason for tolerance in TOLERANCES.values())
