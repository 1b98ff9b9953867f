"""Laws of who writes what, for jobs of many processes that are but described here."""

import collections
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import planning
from whalejax.checkpoint.planning import Extent, balance, make_plan
from whalejax.storage.memory import padded

SEARCH = settings(max_examples=200, derandomize=True, deadline=None)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a job of several processes."""

    number: int
    process_index: int


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A sharding over devices that are not here: those of axis `i` of `mesh` cut axis `i`.

    The last axis of the mesh cuts nothing: its devices hold replicas.
    """

    mesh: tuple[int, ...]
    per_process: int

    def shard_shape(self, shape):
        """As that of JAX."""
        return tuple(n // parts for n, parts in zip(shape, self.mesh[:-1], strict=True))

    def devices_indices_map(self, shape):
        """As that of JAX."""
        return indices_of(self, shape)


@functools.cache  # as JAX keeps them
def indices_of(sharding, shape):
    found = {}
    sizes = sharding.shard_shape(shape)
    for number, place in enumerate(np.ndindex(sharding.mesh)):
        found[Device(number, number // sharding.per_process)] = tuple(
            slice(i * size, (i + 1) * size) for i, size in zip(place, sizes, strict=False)
        )
    return found


class Array:
    """An array over such devices."""

    is_fully_addressable = False

    def __init__(self, shape, dtype, sharding):
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding


@pytest.fixture(autouse=True)
def arrays_of_other_processes(monkeypatch):
    """Lets stand-ins pass for JAX's arrays."""

    class Like(type):
        def __instancecheck__(cls, leaf):
            return isinstance(leaf, Array | jax.Array)

    class Jax:
        Array = Like("Array", (), {})

        def __getattr__(self, name):
            return getattr(jax, name)

    monkeypatch.setattr(planning, "jax", Jax())
    monkeypatch.setattr("whalejax.checkpoint.tree.jax", Jax())


@st.composite
def trees(draw, per_process=2):
    """A tree over a mesh of 2 x 2 x replicas, and the number of its processes."""
    replicas = draw(st.integers(1, 4))
    sharding = Sharding((2, 2, replicas), per_process)
    sizes = st.integers(1, 6).map(lambda n: 2 * n)
    shapes = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
    tree = {f"a{i}": Array(shape, "float32", sharding) for i, shape in enumerate(shapes)}
    tree["host"] = np.zeros(draw(st.integers(0, 30)))
    return tree, 4 * replicas // per_process


def holders_of(plan, extent):
    """The processes whose devices hold all elements of an extent."""
    array, box = plan.leaves.arrays[extent.array], plan.layouts[extent.array].box(extent.index)
    if isinstance(array, np.ndarray):
        return None
    return {
        device.process_index
        for device, index in array.sharding.devices_indices_map(array.shape).items()
        if all(i.start <= a and b <= i.stop for i, (a, b) in zip(index, box, strict=True))
    }


def nbytes_of(plan, process):
    return sum(plan.layouts[extent.array].extent_bytes for extent in plan.extents_of(process))


@SEARCH
@given(case=trees(), extent_bytes=st.integers(1, 200))
def test_each_extent_is_written_once_by_a_process_that_holds_it(case, extent_bytes):
    tree, num_processes = case
    plan = make_plan(tree, num_processes=num_processes, extent_bytes=extent_bytes)
    written = [extent for p in range(num_processes) for extent in plan.extents_of(p)]
    every = {Extent(n, index) for n, layout in plan.layouts.items() for index in layout.indices()}
    assert len(written) == len(set(written)) and set(written) == every
    for extent, writer in plan.writers.items():
        holders = holders_of(plan, extent)
        assert holders is None or writer in holders


@SEARCH
@given(case=trees(), extent_bytes=st.integers(1, 200))
def test_plans_of_equal_trees_are_equal_in_every_process(case, extent_bytes):
    tree, num_processes = case
    here = make_plan(tree, num_processes=num_processes, extent_bytes=extent_bytes)
    backwards = dict(reversed(tree.items()))  # JAX sorts the keys of dicts
    there = make_plan(backwards, num_processes=num_processes, extent_bytes=extent_bytes)
    assert here.layouts == there.layouts
    assert list(here.writers.items()) == list(there.writers.items())


@SEARCH
@given(case=trees(per_process=4), extent_bytes=st.integers(1, 200))
def test_replicas_of_whole_processes_are_written_once_and_evenly(case, extent_bytes):
    tree, _ = case
    replicas = tree["a0"].sharding.mesh[-1]
    tree = {
        name: Array(array.shape, array.dtype, Sharding((1, 1, replicas), 1))
        for name, array in tree.items()
        if name != "host"
    }
    plan = make_plan(tree, num_processes=replicas, extent_bytes=extent_bytes)
    laden = [nbytes_of(plan, process) for process in range(replicas)]
    total = sum(len(list(y.indices())) * y.extent_bytes for y in plan.layouts.values())
    assert sum(laden) == total
    assert max(laden) - min(laden) <= max(y.extent_bytes for y in plan.layouts.values())


@SEARCH
@given(data=st.data())
def test_the_bytes_of_processes_that_may_choose_level_those_that_must_write(data):
    num_processes = data.draw(st.integers(1, 5))
    sizes = data.draw(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 9), min_size=1))
    everyone = tuple(range(num_processes))
    some = st.one_of(st.just(everyone), st.sampled_from([(p,) for p in everyone]))
    holders = {
        Extent(name, (i,)): data.draw(some)
        for name in sizes
        for i in range(data.draw(st.integers(0, 4)))
    }
    writers = balance(holders, sizes)
    assert list(writers) == list(holders)
    assert all(writers[extent] in held for extent, held in holders.items())
    forced = dict.fromkeys(everyone, 0)
    laden = dict.fromkeys(everyone, 0)
    for extent, writer in writers.items():
        laden[writer] += sizes[extent.array]
        forced[writer] += sizes[extent.array] * (len(holders[extent]) == 1)
    # who writes more than it must is never ahead of another by more than its last extent
    for p in everyone:
        if laden[p] > forced[p]:
            assert laden[p] - min(laden.values()) <= max(sizes.values())


@pytest.mark.parametrize("array", [np.zeros(64), jnp.zeros(128)], ids=["numpy", "jax"])
def test_an_array_that_every_process_has_is_shared_out_among_all(array):
    plan = make_plan({"x": array}, num_processes=4, extent_bytes=64)
    assert [nbytes_of(plan, process) for process in range(4)] == [128] * 4


def test_devices_of_this_process_hold_what_jax_says():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = jax.device_put(jnp.zeros((8, 6)), NamedSharding(mesh, P("b", None)))
    plan = make_plan({"x": array}, extent_bytes=48)
    assert plan.layouts["x"].chunk == (2, 6) and set(plan.writers.values()) == {0}


def test_a_plan_without_arrays_still_says_who_writes_what():
    plan = make_plan({"x": np.zeros(8), "n": 3})
    emptied = plan.without_arrays()
    assert emptied.leaves.arrays == {} and emptied.leaves.values == {"n": 3}
    assert emptied.writers == plan.writers and emptied.layouts == plan.layouts


def test_a_plan_for_1024_devices_takes_seconds():
    # DeepSeek-V3's parameters in bf16, roughly: experts over all devices, the rest on 8 replicas
    experts, dense = Sharding((64, 16, 1), 8), Sharding((16, 8, 8), 8)
    tree = {
        f"layer{i}": {
            **{f"expert{j}": Array((256 * 7168, 2048), "uint16", experts) for j in range(3)},
            **{f"dense{j}": Array((7168, 2048), "uint16", dense) for j in range(9)},
            "bias": np.zeros(256),
        }
        for i in range(58)
    }
    begin = time.perf_counter()
    plan = make_plan(tree, num_processes=128)
    assert time.perf_counter() - begin < 20  # 3 s on an idle core
    extents = collections.Counter(plan.writers.values())  # of 14 or 16 MiB
    assert len(extents) == 128 and max(extents.values()) < 1.05 * extents.total() / 128


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_an_extent_in_memory_ends_on_a_page(size):
    assert padded(size) % 4096 == 0 and 0 <= padded(size) - size < 4096
