"""Laws of how arrays are cut into extents."""

import math
import time

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.checkpoint.layout import (
    ArrayLayout,
    choose_chunk,
    dtype_named,
    extent_file,
    lengths,
    overlap,
    within,
    zarr_file,
    zarr_json,
)

MIB = 2**20
DTYPES = [np.dtype(name) for name in ("uint8", "uint16", "float32", "complex128")]
SEARCH = settings(max_examples=300, derandomize=True, deadline=None)


@st.composite
def cuts(draw, most=8, axes=3):
    """An array's shape, the shape of its shards, a dtype, and bytes wanted of an extent."""
    parts = draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, 3)), max_size=axes))
    shard = tuple(length for length, _ in parts)
    shape = tuple(length * count for length, count in parts)
    return shape, shard, draw(st.sampled_from(DTYPES)), draw(st.integers(1, 800))


def laid_out(cut):
    shape, shard, dtype, extent_bytes = cut
    return ArrayLayout(shape, dtype, choose_chunk(shape, shard, dtype.itemsize, extent_bytes))


def slices(box):
    return tuple(slice(*side) for side in box)


@SEARCH
@given(cut=cuts())
def test_chunks_hold_each_element_once(cut):
    layout = laid_out(cut)
    held = np.zeros(layout.shape, int)
    for index in layout.indices():
        held[slices(layout.box(index))] += 1
    assert (held == 1).all()
    assert len(list(layout.indices())) == math.prod(layout.grid)


@SEARCH
@given(cut=cuts())
def test_a_chunk_lies_in_one_shard_as_one_run_of_its_bytes(cut):
    layout = laid_out(cut)
    memory = np.empty(cut[1], layout.dtype)
    for index in layout.indices():
        box = layout.box(index)
        begin = [start // size * size for (start, _), size in zip(box, cut[1], strict=True)]
        shard = tuple((first, first + size) for first, size in zip(begin, cut[1], strict=True))
        assert overlap(box, shard) == box, f"{box} crosses the edge of the shard {shard}"
        assert memory[within(box, shard)].flags.c_contiguous


@SEARCH
@given(cut=cuts())
def test_equal_chunks_are_filled_up_by_less_than_a_row_each_along_an_axis_of_one_shard(cut):
    layout = laid_out(cut)
    filled = [
        count * size - length
        for count, size, length in zip(layout.grid, layout.chunk, layout.shape, strict=True)
    ]
    assert all(0 <= rows < max(count, 1) for rows, count in zip(filled, layout.grid, strict=True))
    assert all(rows < size for rows, size in zip(filled, layout.chunk, strict=True))
    padded = [axis for axis, rows in enumerate(filled) if rows]
    assert len(padded) <= 1 and all(cut[0][axis] == cut[1][axis] for axis in padded)


@SEARCH
@given(cut=cuts(most=40))
def test_extents_of_axes_in_one_shard_have_a_quarter_to_all_of_the_bytes_wanted(cut):
    _, shard, dtype, wanted = cut
    layout = laid_out((shard, shard, dtype, wanted))
    whole = math.prod(shard) * dtype.itemsize
    assert layout.extent_bytes <= max(wanted, dtype.itemsize)
    # half is lost where rows are counted down, half where equal parts are
    assert layout.extent_bytes >= min(wanted / 4, whole)


@SEARCH
@given(cut=cuts(most=40))
def test_extents_have_about_the_bytes_wanted_where_divisors_allow(cut):
    _, shard, dtype, wanted = cut
    possible = [
        rows * math.prod(shard[axis + 1 :]) * dtype.itemsize
        for axis, length in enumerate(shard)
        for rows in range(1, length + 1)
        if length % rows == 0
    ]
    if any(wanted / 2 <= nbytes <= wanted * 2 for nbytes in possible):
        # 8 and not 4, as rows are counted down before the nearest divisor is taken
        assert wanted / 8 <= laid_out(cut).extent_bytes <= wanted * 4


@SEARCH
@given(cut=cuts(), data=st.data())
def test_touching_is_all_that_share_an_element(cut, data):
    layout = laid_out(cut)
    sides = [
        sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in layout.shape
    ]
    box = tuple((start, stop) for start, stop in sides)
    inside = np.zeros(layout.shape, bool)
    inside[slices(box)] = True
    sharing = [index for index in layout.indices() if inside[slices(layout.box(index))].any()]
    assert list(layout.touching(box)) == sharing


@SEARCH
@given(data=st.data())
def test_overlap_and_within_cut_what_numpy_cuts(data):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    a, b = (tuple(tuple(data.draw(side)) for side in sides) for _ in range(2))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    in_both = set(numbers[slices(a)].flat) & set(numbers[slices(b)].flat)
    shared = overlap(a, b)
    assert math.prod(lengths(shared)) == len(in_both)
    if in_both:
        assert set(numbers[slices(a)][within(shared, a)].flat) == in_both
        assert set(numbers[slices(b)][within(shared, b)].flat) == in_both


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 5)], ids=str)
def test_an_array_without_elements_has_no_extents(shape):
    layout = laid_out((shape, shape, np.dtype("float32"), 16))
    assert list(layout.indices()) == [] and min(layout.chunk) > 0
    assert list(layout.touching(tuple((0, n) for n in shape))) == []


def test_an_array_without_axes_is_one_extent():
    layout = laid_out(((), (), np.dtype("float32"), 16))
    assert list(layout.indices()) == list(layout.touching(())) == [()]
    assert layout.extent_bytes == 4 and extent_file("x", ()) == "arrays/x/c"


EXPERTS, VOCABULARY = (58, 256, 7168, 2048), (129280, 7168)  # DeepSeek-V3's


@pytest.mark.parametrize(
    ("shape", "shard", "itemsize", "count"),
    [
        (EXPERTS, EXPERTS, 1, 58 * 256),
        (EXPERTS, EXPERTS, 2, 58 * 256 * 2),
        (EXPERTS, (58, 8, 7168, 2048), 1, 58 * 256),
        (EXPERTS, (58, 4, 896, 2048), 2, 58 * 64 * 8),
        (VOCABULARY, VOCABULARY, 2, 111),
        (VOCABULARY, (16160, 7168), 4, 256),
        (VOCABULARY, (129280, 896), 4, 224),
    ],
    ids=str,
)
def test_extents_of_deepseek_v3_have_4_to_32_mib(shape, shard, itemsize, count):
    layout = ArrayLayout(
        shape, np.dtype(f"u{itemsize}"), choose_chunk(shape, shard, itemsize, 16 * MIB)
    )
    assert 4 * MIB <= layout.extent_bytes <= 32 * MIB
    assert math.prod(layout.grid) == count


@pytest.mark.parametrize("length", [10**9, 10**9 + 7, 2**40], ids=["round", "prime", "power"])
def test_long_shards_are_cut_at_once(length):
    begin = time.perf_counter()
    (rows,) = choose_chunk((2 * length,), (length,), 4, 16 * MIB)
    assert time.perf_counter() - begin < 1
    assert length % rows == 0
    assert (rows == length) == (length == 10**9 + 7)  # a prime has no other divisor than 1


@pytest.mark.parametrize(
    "name",
    [
        *("bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64"),
        *("complex64", "complex128", "bfloat16", "int2", "int4", "uint4", "float4_e2m1fn"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
        *("float8_e4m3b11fnuz", "float8_e8m0fnu", "float8_e4m3", "float8_e3m4"),
        *("float6_e2m3fn", "float6_e3m2fn", "int1", "uint1", "uint2"),
    ],
)
def test_other_programs_read_what_the_metadata_tells(tmp_path, name):
    dtype = dtype_named(name)
    array = np.arange(5).astype(dtype)
    layout = ArrayLayout((5,), dtype, (3,))
    for i in range(2):
        file = tmp_path / extent_file("x", (i,))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(array[3 * i : 3 * i + 3].tobytes() + bytes(i * dtype.itemsize))
    (tmp_path / zarr_file("x")).write_bytes(zarr_json(layout))
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/arrays/x/"}
    read = ts.open(spec).result().read().result()
    assert read.view(np.uint8).tobytes() == array.tobytes()


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="'float7' is no dtype"):
        dtype_named("float7")
