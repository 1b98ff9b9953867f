import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.groups import (
    FEW_GROUPS,
    aligned,
    exclusive_cumsum,
    group_of_tiles,
    locate,
    real_rows,
    rows_of_tiles,
)

ALIGNMENT, TILES = 8, 24  # few shapes, as each is compiled
SIZES = st.sampled_from([1, 3, 6]).flatmap(
    lambda groups: st.lists(
        st.integers(0, TILES * ALIGNMENT // groups // 2), min_size=groups, max_size=groups
    )
)


def lay_out(sizes):
    """The group of each row, -1 for padding, by filling tiles one after another."""
    rows = []
    for group, size in enumerate(sizes):
        rows += [group] * size + [-1] * (-size % ALIGNMENT)
    return np.array(rows + [-1] * (TILES * ALIGNMENT - len(rows))).reshape(TILES, ALIGNMENT)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(sizes=SIZES)
def test_tiles_belong_to_the_group_whose_rows_fill_them(sizes):
    rows = lay_out(sizes)
    group = np.asarray(group_of_tiles(jnp.array(sizes, jnp.int32), TILES, ALIGNMENT))
    filled = (rows >= 0).any(axis=1)
    assert (rows.max(axis=1)[filled] == group[filled]).all()
    # tiles without rows lie past the last group, and name one that exists
    assert (group[~filled] == len(sizes) - 1).all() and group.dtype == np.int32


@settings(max_examples=60, derandomize=True, deadline=None)
@given(sizes=SIZES)
def test_real_rows_are_those_of_groups(sizes):
    rows, sizes = lay_out(sizes), jnp.array(sizes, jnp.int32)
    filled = rows_of_tiles(sizes, TILES, ALIGNMENT)
    np.testing.assert_array_equal(filled, (rows >= 0).sum(axis=1))
    real = np.asarray(real_rows(sizes, TILES * ALIGNMENT, ALIGNMENT))
    np.testing.assert_array_equal(real, (rows >= 0).reshape(-1))
    assert real.sum() == sizes.sum()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(sizes=SIZES)
def test_groups_start_where_the_padding_before_them_ends(sizes):
    starts = exclusive_cumsum(aligned(jnp.array(sizes, jnp.int32), ALIGNMENT))
    rows = lay_out(sizes).reshape(-1)
    for group, (start, size) in enumerate(zip(np.asarray(starts), sizes, strict=True)):
        assert start % ALIGNMENT == 0
        np.testing.assert_array_equal(np.flatnonzero(rows == group), start + np.arange(size))


@pytest.mark.parametrize("groups", [1, 2, FEW_GROUPS, FEW_GROUPS + 1, 200])
def test_few_groups_and_many_are_searched_alike(groups):
    sizes = np.random.default_rng(groups).integers(0, 20, groups).astype(np.int32)
    sizes[groups // 2] = 0
    starts = np.cumsum([0, *-(-sizes[:-1] // ALIGNMENT) * ALIGNMENT])
    rows = np.arange(starts[-1] + 40, dtype=np.int32)
    group, start = jax.jit(lambda s, r: locate(s, r, ALIGNMENT))(sizes, rows)
    np.testing.assert_array_equal(group, [np.flatnonzero(starts <= row)[-1] for row in rows])
    np.testing.assert_array_equal(start, starts[group])
    assert group.dtype == start.dtype == np.int32


@pytest.mark.parametrize("alignment", [1, 3, 8, 128])
def test_sizes_are_rounded_up(alignment):
    sizes = jnp.array([0, 1, alignment, alignment + 1], jnp.int32)
    expected = [0, alignment, alignment, 2 * alignment]
    np.testing.assert_array_equal(aligned(sizes, alignment), expected)
