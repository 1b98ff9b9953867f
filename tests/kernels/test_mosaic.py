import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whalejax.kernels import mosaic

GRIDS = {
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 20),
    "width": st.integers(1, 10),
    "clusters": st.integers(1, 33),
    "group": st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)]),
}


def in_order(items):
    """Each CTA's items, and those past its count left out."""
    return [
        list(zip(row[:count].tolist(), column[:count].tolist(), strict=True))
        for row, column, count in zip(*map(np.asarray, items), strict=True)
    ]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(**GRIDS)
def test_every_tile_is_dealt_once(rows, columns, width, clusters, group):
    ctas = clusters * math.prod(group)
    items = mosaic.deal(rows, columns, max_rows=rows, width=width, ctas=ctas, group=group)
    assert items.row.shape == items.column.shape and items.row.shape[0] == ctas
    dealt = [item for cta in in_order(items) for item in cta]
    inside = [(row, column) for row, column in dealt if row < rows and column < columns]
    assert sorted(inside) == [(row, column) for row in range(rows) for column in range(columns)]
    # past the grid are only a cluster's last tiles: of one whose first tile lies inside
    for row, column in set(dealt) - set(inside):
        assert row - row % group[0] < rows and column - column % group[1] < columns
    counts = np.asarray(items.counts)
    assert counts.max() == items.row.shape[1] and counts.max() - counts.min() <= 1


@settings(max_examples=100, derandomize=True, deadline=None)
@given(**GRIDS)
def test_a_cluster_works_on_neighbours_at_the_same_time(rows, columns, width, clusters, group):
    size = math.prod(group)
    items = mosaic.deal(
        rows, columns, max_rows=rows, width=width, ctas=clusters * size, group=group
    )
    dealt = in_order(items)
    for first in range(0, len(dealt), size):
        for tiles in zip(*dealt[first : first + size], strict=True):
            row, column = tiles[0]
            assert row % group[0] == 0 and column % group[1] == 0
            assert list(tiles) == [
                (row + down, column + across)
                for down in range(group[0])
                for across in range(group[1])
            ]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(**GRIDS)
def test_tiles_under_way_together_share_operands(rows, columns, width, clusters, group):
    """One turn of all CTAs spans no more bands than its tiles fill, and few columns in a band."""
    size = math.prod(group)
    items = mosaic.deal(
        rows, columns, max_rows=rows, width=width, ctas=clusters * size, group=group
    )
    assume(clusters >= width)
    across = -(-columns // group[1])
    for turn in range(items.row.shape[1]):
        working = items.counts > turn
        bands = items.row[working, turn] // (width * group[0])
        assert np.ptp(bands) <= -(-clusters // across)
        if np.ptp(bands) == 0 and (bands[0] + 1) * width * group[0] <= rows:
            # a full band of `width` clusters is walked column by column
            assert np.ptp(items.column[working, turn] // group[1]) <= -(-clusters // width)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(**GRIDS)
def test_bands_of_columns_are_bands_of_rows_turned(rows, columns, width, clusters, group):
    options = {"width": width, "ctas": clusters * math.prod(group)}
    across = mosaic.deal(rows, columns, max_rows=rows, group=group, bands="columns", **options)
    turned = mosaic.deal(columns, rows, max_rows=columns, group=group[::-1], **options)
    for got, wanted in zip(in_order(across), in_order(turned), strict=True):
        assert got == [(row, column) for column, row in wanted]


def test_every_other_band_is_walked_backwards():
    items = mosaic.deal(5, 3, max_rows=5, width=2, ctas=1, group=(1, 1))
    forwards = [(row, column) for column in range(3) for row in (0, 1)]
    backwards = [(row, column) for column in (2, 1, 0) for row in (2, 3)]
    assert in_order(items) == [[*forwards, *backwards, (4, 0), (4, 1), (4, 2)]]


@pytest.mark.parametrize("group", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(("columns", "width", "clusters"), [(3, 2, 4), (7, 8, 5), (1, 1, 1)])
def test_rows_known_on_the_device_are_dealt_alike(columns, width, clusters, group):
    options = {"max_rows": 24, "width": width, "ctas": clusters * math.prod(group), "group": group}

    @jax.jit
    def deal(rows):
        return mosaic.deal(rows, columns, **options)

    for rows in (0, 1, 2, 7, 23, 24):
        static, dynamic = mosaic.deal(rows, columns, **options), deal(jnp.int32(rows))
        assert in_order(static) == in_order(dynamic)
        assert all(part.dtype == np.int32 for part in (*static, *dynamic))
        assert sum(map(len, in_order(dynamic))) >= rows * columns


def test_a_table_holds_an_item_in_a_sector():
    row, column = np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((2, 3), np.int32)
    items = mosaic.Items(row, column, np.asarray([3, 2], np.int32))
    for columns in ((row, column), (row, jnp.asarray(column))):
        table = mosaic.table(items, *columns)
        assert table.shape == (2, 3, 8) and table.dtype == jnp.int32
        np.testing.assert_array_equal(table[..., 0], row)
        np.testing.assert_array_equal(table[..., 1], column)
        assert not np.asarray(table[..., 2:7]).any()
        np.testing.assert_array_equal(table[:, 0, 7], items.counts)


@pytest.mark.parametrize(
    ("edge", "dtype", "panel"),
    [
        (128, jnp.bfloat16, 64),
        (48, jnp.bfloat16, 16),  # 96 bytes: three of 32
        (16, jnp.float32, 16),
        (8, jnp.float32, 8),
        (56, jnp.bfloat16, 176),  # 112 bytes: no swizzle divides them
    ],
)
def test_panels_are_the_widest_swizzle_that_divides_the_edge(edge, dtype, panel):
    assert mosaic.panel_columns(176, edge, dtype) == panel


def test_buffers_are_rounded_up_to_where_the_next_starts():
    assert [mosaic.rounded(n) for n in (0, 1, 1024, 1025)] == [0, 1024, 1024, 2048]


@pytest.mark.parametrize(
    ("columns", "dtype", "swizzle"),
    [(128, jnp.float8_e4m3fn, 128), (64, jnp.bfloat16, 128), (16, jnp.bfloat16, 32)],
)
def test_tiles_one_swizzle_wide_are_swizzled(columns, dtype, swizzle):
    tiling, swizzling = mosaic.transforms(columns, dtype)
    assert tiling.tiling == (8, columns) and swizzling.swizzle == swizzle
    assert mosaic.transforms(columns + 8, dtype) == ()


def test_an_h100_is_assumed_where_there_is_no_gpu():
    assert mosaic.num_sms() == 132
