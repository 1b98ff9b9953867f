"""What was saved on one mesh is restored on another, in another dtype, into memory of any order."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.reading import Part, read_parts

SEARCH = settings(max_examples=60, derandomize=True, deadline=None)
MESHES = [(1,), (2,), (3,), (5,), (8,), (2, 2), (2, 4), (4, 2), (3, 2), (2, 2, 2)]
AXES = ("x", "y", "z")
FLOATS = [np.dtype(name) for name in ("float32", "float16", ml_dtypes.bfloat16)]
FLOATS += [np.dtype(name) for name in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)]
INTEGERS = [np.dtype(name) for name in ("int32", "int16", "int8", ml_dtypes.int4)]


@functools.cache
def mesh_of(shape, last):
    """A mesh of the first devices, or of the last ones in reversed order."""
    count = math.prod(shape)
    devices = jax.devices()[::-1][:count] if last else jax.devices()[:count]
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, AXES[: len(shape)], axis_types=types, devices=devices)


@st.composite
def shardings(draw, rank):
    """A sharding of an array's axes over a mesh of 1 to 8 devices; the rest are replicas."""
    shape = draw(st.sampled_from(MESHES))
    mesh = mesh_of(shape, draw(st.booleans()))
    entries = [[] for _ in range(rank)]
    for axis in draw(st.permutations(AXES[: len(shape)])):
        place = draw(st.integers(-1, rank - 1))
        if place >= 0:
            entries[place].append(axis)
    return NamedSharding(mesh, P(*(tuple(entry) or None for entry in entries)))


def parts_of(sharding, rank):
    """Shards along each axis."""
    shape = (120,) * rank  # which all numbers of devices up to 6, and 8, divide
    return [120 // size for size in sharding.shard_shape(shape)]


@st.composite
def moves(draw):
    """An array, the sharding that it is saved on, and the one that it is restored on."""
    rank = draw(st.integers(0, 3))
    before, after = draw(shardings(rank)), draw(shardings(rank))
    pairs = zip(parts_of(before, rank), parts_of(after, rank), strict=True)
    shape = [math.lcm(*pair) * draw(st.integers(0 if rank == 3 else 1, 2)) for pair in pairs]
    seed = draw(st.integers(0, 9))
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)
    return np.asarray(bits).view(np.float32).reshape(shape), before, after


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a tree as the only step of a store of its own, and gives the store."""
    folder, numbers = tmp_path_factory.mktemp("stores"), iter(range(10**6))

    def save(tree, extent_bytes):
        store = CheckpointStore(folder / str(next(numbers)), extent_bytes=extent_bytes)
        store.save(0, tree)
        store.wait()
        return store

    return save


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def few_files(array, extent_bytes):
    """An extent's size with which the array is not cut into more than about a hundred."""
    return max(extent_bytes, array.nbytes // 64)


@SEARCH
@given(move=moves(), extent_bytes=st.integers(1, 600))
def test_any_sharding_is_restored_on_any_other(save, move, extent_bytes):
    array, before, after = move
    store = save({"x": jax.device_put(array, before)}, few_files(array, extent_bytes))
    like = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=after)
    restored = store.restore(0, {"x": like})["x"]
    assert restored.sharding == after
    assert_same_bits(restored, array)
    for shard in restored.addressable_shards:
        assert_same_bits(shard.data, array[shard.index])


@SEARCH
@given(move=moves(), extent_bytes=st.integers(1, 600), data=st.data())
def test_any_sharding_is_restored_in_another_dtype_of_its_kind(save, move, extent_bytes, data):
    bits, before, after = move
    kind = data.draw(st.sampled_from([FLOATS, INTEGERS]))
    stored, wanted = data.draw(st.sampled_from(kind)), data.draw(st.sampled_from(kind))
    numbers = np.arange(bits.size).reshape(bits.shape) % 15 - 7  # which every dtype here has
    array = numbers.astype(stored)
    store = save({"x": jax.device_put(array, before)}, few_files(array, extent_bytes))
    like = jax.ShapeDtypeStruct(array.shape, wanted, sharding=after)
    assert_same_bits(store.restore(0, {"x": like})["x"], numbers.astype(wanted))


@SEARCH
@given(move=moves(), extent_bytes=st.integers(1, 600), data=st.data())
def test_any_sharding_is_restored_into_memory_of_any_order(save, move, extent_bytes, data):
    array, before, _ = move
    store = save({"x": jax.device_put(array, before)}, few_files(array, extent_bytes))
    axes = data.draw(st.permutations(range(array.ndim)))
    steps = tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in axes)
    room = np.full([3 * n for n in np.array(array.shape, int)[list(axes)]], 7, np.float32)
    untouched = np.ones(room.shape, bool)
    inside = tuple(
        slice(n, None if part.step == 2 else 2 * n, part.step)
        if part.step > 0
        else slice(2 * n - 1, n - 1 if n else None, -1)
        for n, part in zip(np.array(array.shape, int)[list(axes)], steps, strict=True)
    )
    target = room[(*inside, ...)].transpose(np.argsort(axes))
    untouched[(*inside, ...)] = False
    assert store.restore(0, {"x": target})["x"] is target
    assert_same_bits(target, array)
    assert (room[untouched] == 7).all()


@SEARCH
@given(data=st.data())
def test_any_boxes_are_read_as_one_of_several_processes_reads_its_own(save, data):
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3))
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    store = save({"x": array}, data.draw(st.integers(1, 64)))
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    boxes = data.draw(st.lists(st.tuples(*sides), min_size=1, max_size=3))
    parts = [Part(box, np.full([b - a for a, b in box], -1, np.float32)) for box in boxes]
    stored, seen = store.manifest(0).arrays["x"], []
    read_parts(store.place, "0", {"x": (stored, parts)}, progressed=seen.append)
    touched = {index for box in boxes for index in stored.layout.touching(box)}
    assert seen == [stored.layout.extent_bytes] * len(touched)  # those, and each once
    for box, memory in parts:
        np.testing.assert_array_equal(memory, array[tuple(slice(*side) for side in box)])


def test_floats_are_rounded_to_the_nearest_when_they_become_shorter(save):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    store = save({"x": x}, 256)
    like = {"x": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)}
    assert_same_bits(store.restore(0, like)["x"], jnp.asarray(x).astype(jnp.bfloat16))
    target = np.zeros(1000, ">f8")
    np.testing.assert_array_equal(store.restore(0, {"x": target})["x"], x)


def test_concrete_arrays_lend_their_sharding_and_stay_as_they_are(save):
    mesh = mesh_of((2, 4), False)
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    store = save({"x": jax.device_put(x, NamedSharding(mesh, P("y", "x")))}, 64)
    like = jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh, P(None, "y")))
    restored = store.restore(0, {"x": like})["x"]
    assert restored.sharding == like.sharding and not np.asarray(like).any()
    assert_same_bits(restored, x)


def test_without_a_sharding_an_array_goes_to_the_first_device(save):
    x = np.arange(8, dtype=np.float32)
    store = save({"x": jax.device_put(x, jax.devices()[3])}, 8)
    restored = store.restore(0, {"x": jax.ShapeDtypeStruct((8,), np.float32)})["x"]
    assert restored.sharding == SingleDeviceSharding(jax.devices()[0])
    assert_same_bits(restored, x)
