import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels import mosaic

GRIDS = {
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 20),
    "width": st.integers(1, 10),
}


NUMBERS = np.arange(40 * 20, dtype=np.int32)


@functools.partial(jax.jit, static_argnames="bands")
def placed(rows, columns, width, bands):
    return jax.vmap(lambda i: mosaic.place(i, rows, columns, width, bands))(NUMBERS)


def walked(rows, columns, width, bands="rows"):
    """All tiles of a grid, in order."""
    row, column = placed(rows, columns, width, bands)
    return list(zip(row.tolist(), column.tolist(), strict=True))[: rows * columns]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(**GRIDS, bands=st.sampled_from(["rows", "columns"]))
def test_every_tile_is_walked_once(rows, columns, width, bands):
    assert sorted(walked(rows, columns, width, bands)) == [
        (row, column) for row in range(rows) for column in range(columns)
    ]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(tiles=st.integers(0, 300), workers=st.integers(1, 132))
def test_every_tile_has_one_turn(tiles, workers):
    counts = [mosaic.turns(tiles, worker, workers) for worker in range(workers)]
    assert sum(counts) == tiles and counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@settings(max_examples=100, derandomize=True, deadline=None)
@given(**GRIDS, together=st.integers(1, 40))
def test_tiles_under_way_together_share_operands(rows, columns, width, together):
    """They span no more bands than they fill, and few columns of a band."""
    tiles = walked(rows, columns, width)
    for first in range(0, len(tiles), together):
        working = np.array(tiles[first : first + together])
        bands = working[:, 0] // width
        assert np.ptp(bands) <= -(-together // columns)
        if np.ptp(bands) == 0 and (bands[0] + 1) * width <= rows:
            # a full band is walked column by column
            assert np.ptp(working[:, 1]) <= -(-together // width)


def test_every_other_band_is_walked_backwards():
    forwards = [(row, column) for column in range(3) for row in (0, 1)]
    backwards = [(row, column) for column in (2, 1, 0) for row in (2, 3)]
    assert walked(5, 3, 2) == [*forwards, *backwards, (4, 0), (4, 1), (4, 2)]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(**GRIDS)
def test_bands_of_columns_are_bands_of_rows_turned(rows, columns, width):
    turned = walked(columns, rows, width)
    assert walked(rows, columns, width, "columns") == [(row, column) for column, row in turned]


@pytest.mark.parametrize("bands", ["rows", "columns"])
def test_a_grid_known_on_the_device_is_walked_alike(bands):
    place = jax.vmap(lambda i, rows: mosaic.place(i, rows, 7, 4, bands), in_axes=(0, None))
    for rows in (1, 2, 7, 23, 24):
        row, column = map(np.asarray, jax.jit(place)(NUMBERS, rows))
        known = walked(rows, 7, 4, bands)
        assert list(zip(row.tolist(), column.tolist(), strict=True))[: len(known)] == known


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
