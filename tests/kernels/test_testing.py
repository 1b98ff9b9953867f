import numpy as np
import pytest

from whalejax.kernels.testing import assert_rows_close, row_errors


def test_the_worst_row_counts():
    truth = np.random.default_rng(0).normal(size=(4096, 64))
    wrong = truth.copy()
    wrong[7] = 0
    assert row_errors(wrong, truth)[7] == 1
    with pytest.raises(AssertionError, match=r"1 of 4096 rows .* row \(7,\)"):
        assert_rows_close(wrong, truth, tolerance=0.5)
    assert_rows_close(wrong, truth, tolerance=1.0)


def test_errors_are_relative_to_the_row():
    truth = np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(row_errors(truth + np.array([[0.5, 0], [0, 0]]), truth), [0.1, 0.0])
    assert row_errors(truth + 1, truth)[1] == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad):
    truth = np.ones((2, 3))
    wrong = truth.copy()
    wrong[1, 2] = bad
    with pytest.raises(AssertionError):
        assert_rows_close(wrong, truth, tolerance=np.inf)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        row_errors(np.ones(2), np.ones(3))
