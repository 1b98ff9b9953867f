"""Errors by row, for tests, benchmarks and users' own checks.

A measure over a whole matrix hides a few wrong rows among many right ones; the worst row does not.
"""

import numpy as np
from jax.typing import ArrayLike


def row_errors(actual: ArrayLike, expected: ArrayLike) -> np.ndarray:
    """Relative error of every row, in float64.

    Args:
      actual: `[..., N]` of any real dtype; a row is what the last axis runs over.
      expected: `[..., N]`, the truth.

    Returns:
      `f64[...]`, ‖actual − expected‖ / ‖expected‖ of each row. Where the expected row is zero: 0 if
      the actual one is zero too, else infinity. NaN where either row holds a NaN or an infinity.

    Raises:
      ValueError: shapes differ, or there is no axis.
    """
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    if actual.shape != expected.shape or actual.ndim == 0:
        raise ValueError(
            f"row_errors: actual.shape={actual.shape} and expected.shape={expected.shape} must be "
            f"equal and have at least one axis"
        )
    finite = np.isfinite(actual).all(axis=-1) & np.isfinite(expected).all(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        difference = np.linalg.norm(actual - expected, axis=-1)
        ratio = difference / np.linalg.norm(expected, axis=-1)
    return np.where(finite, np.where(difference == 0, 0.0, ratio), np.nan)


def assert_rows_close(actual: ArrayLike, expected: ArrayLike, *, tolerance: float) -> None:
    """Asserts that the worst row's relative error is at most `tolerance`; a NaN never passes.

    Args:
      actual: `[..., N]` of any real dtype.
      expected: `[..., N]`, the truth.
      tolerance: largest relative error of a row.

    Raises:
      AssertionError: a row is worse; prints how many, the worst one's index and its error.
      ValueError: shapes differ.
    """
    errors = np.atleast_1d(row_errors(actual, expected))
    wrong = ~(errors <= tolerance)  # NaN compares false, so it counts as wrong
    if wrong.any():
        worst = np.unravel_index(
            np.argmax(np.where(np.isnan(errors), np.inf, errors)), errors.shape
        )
        raise AssertionError(
            f"{wrong.sum()} of {errors.size} rows differ by more than {tolerance:.3g}; the worst "
            f"is row {tuple(map(int, worst))} with a relative error of {errors[worst]:.3g}"
        )
