"""How much host memory saving and restoring take, and that memory used again spoils nothing."""

import math
import threading
import tracemalloc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore, restoring
from whalejax.checkpoint.restoring import _groups, _Target
from whalejax.storage import memory
from whalejax.storage.memory import PAGE, Arena, host_array

MIB = 2**20
SLACK = 2 * MIB  # a manifest's pieces of 512 KiB, plans, threads


def numbers(index, nbytes=MIB):
    """`f32[n, 256]`, other numbers for each index."""
    return np.arange(index, index + nbytes // 4, dtype=np.float32).reshape(-1, 256)


@pytest.fixture
def store(tmp_path):
    """A store whose files hold 256 KiB."""
    with CheckpointStore(tmp_path, extent_bytes=MIB // 4) as store:
        yield store


@pytest.fixture
def traced(monkeypatch):
    """Python's and NumPy's allocations; what would be mapped, which it cannot see, among them."""
    monkeypatch.setattr(memory, "MAPPED", math.inf)
    tracemalloc.start()
    yield tracemalloc
    tracemalloc.stop()


def peak_of(traced, call):
    """Bytes that a call allocated at most, and those that are left of them."""
    before, _ = traced.get_traced_memory()
    traced.reset_peak()
    call()
    after, peak = traced.get_traced_memory()
    return peak - before, after - before


@pytest.mark.parametrize("order", ["C", "F", "big-endian"])
def test_a_save_in_the_background_holds_one_copy_and_the_next_one_no_more(store, traced, order):
    tree = {f"{i}": numbers(i) for i in range(8)}
    if order == "F":
        tree = {name: np.asfortranarray(x) for name, x in tree.items()}
    if order == "big-endian":
        tree = {name: x.astype(">f4") for name, x in tree.items()}

    def save(step):
        store.save(step, tree)
        store.wait()

    peak, held = peak_of(traced, lambda: save(1))
    assert 8 * MIB <= held <= 8 * MIB + SLACK and peak <= 8 * MIB + SLACK
    peak, held = peak_of(traced, lambda: [save(step) for step in (2, 3)])
    assert peak <= SLACK and held <= SLACK
    assert store._arena.nbytes == 8 * MIB


def test_a_save_that_blocks_copies_nothing(store, traced):
    tree = {f"{i}": numbers(i) for i in range(8)}
    peak, _ = peak_of(traced, lambda: store.save(1, tree, block=True))
    assert peak <= SLACK and store._arena.nbytes == 0


def test_a_save_that_waits_for_another_has_copied_nothing_yet(store, traced):
    go, write = threading.Event(), store.place.write

    def late(*args):
        assert go.wait(60)
        write(*args)

    store.place.write = late
    store.save(1, {"x": numbers(0, 8 * MIB)})
    held, _ = traced.get_traced_memory()
    thread = threading.Thread(target=lambda: store.save(2, {"x": numbers(1, 8 * MIB)}))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    # the second tree itself, and no copy of it
    assert traced.get_traced_memory()[0] - held <= 8 * MIB + SLACK
    go.set()
    thread.join()
    store.wait()
    for step in (1, 2):
        np.testing.assert_array_equal(store.restore(step)["x"], numbers(step - 1, 8 * MIB))


def test_an_arena_grows_to_the_largest_and_stays():
    arena = Arena()
    for nbytes in (10, 5000, 3 * MIB, 10):
        room = arena.reserve(nbytes)
        assert room.nbytes == nbytes and room.ctypes.data % PAGE == 0
    assert arena.nbytes == 3 * MIB


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float32", jnp.bfloat16], ids=str)
def test_host_arrays_begin_on_a_page(shape, dtype):
    array = host_array(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.flags.writeable
    assert array.size == 0 or array.ctypes.data % PAGE == 0


# Through buffers, as to other devices than CPUs


class Reserved(NamedTuple):
    """A buffer was reserved."""

    buffer: Arena
    nbytes: int


class Awaited(NamedTuple):
    """What was sent was waited for."""

    names: list[str]


@pytest.fixture
def through_buffers(monkeypatch):
    """Sends arrays through buffers of 2 MiB; notes when one is reserved, and what is awaited."""
    events = []

    class Noted(Arena):
        def reserve(self, nbytes):
            events.append(Reserved(self, nbytes))
            return super().reserve(nbytes)

    def awaited(sent):
        if isinstance(sent, dict):
            events.append(Awaited(sorted(sent)))
        return ready(sent)

    put, ready = jax.device_put, jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", awaited)
    # a CPU's array may lie where the buffer does, which is used again: here it has to be copied
    monkeypatch.setattr(jax, "device_put", lambda x, device: put(x.copy(), device))
    monkeypatch.setattr(restoring._Target, "on_host", False)
    monkeypatch.setattr(restoring, "BUFFER_BYTES", 2 * MIB)
    monkeypatch.setattr(restoring, "Arena", Noted)
    return events


def test_two_buffers_are_filled_in_turn_and_bound_what_is_held(store, through_buffers):
    tree = {f"{i:02}": numbers(i) for i in range(9)}
    store.save(1, tree, block=True)
    restored = store.restore(1, jax.tree.map(jnp.zeros_like, tree))
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    one, other = (event.buffer for event in through_buffers[:2])
    assert one is not other
    # no transfer here takes so long that skipping a wait would spoil it: only the order can tell
    assert through_buffers == [
        *(Reserved(one, 2 * MIB), Reserved(other, 2 * MIB)),
        *(Awaited(["00", "01"]), Reserved(one, 2 * MIB)),
        *(Awaited(["02", "03"]), Reserved(other, 2 * MIB)),
        *(Awaited(["04", "05"]), Reserved(one, MIB)),
    ]


def test_arrays_larger_than_a_buffer_get_one_as_large_as_they_are(store, through_buffers):
    tree = {"a": numbers(1), "b": numbers(2, 5 * MIB), "c": numbers(3), "d": numbers(4, 3 * MIB)}
    tree |= {"key": jax.random.key(3), "n": 5, "host": np.zeros(4)}
    store.save(1, tree, block=True)
    restored = store.restore(1, tree | {name: jnp.zeros_like(tree[name]) for name in "abcd"})
    for name in "abcd":
        np.testing.assert_array_equal(restored[name], tree[name])
    assert jax.random.bits(restored["key"]) == jax.random.bits(tree["key"]) and restored["n"] == 5
    sizes = [event.nbytes for event in through_buffers if isinstance(event, Reserved)]
    assert sizes == [MIB, 5 * MIB, MIB, 3 * MIB, PAGE]


def test_replicas_share_a_buffer_and_shards_have_parts_of_it(store, through_buffers):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tree = {f"{i}": numbers(i) for i in range(4)}
    tree["odd"] = np.arange(12, dtype=np.int8)
    store.save(1, tree, block=True)
    sharding = NamedSharding(mesh, P("x"))
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for n, x in tree.items()}
    restored = store.restore(1, like)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    # 4 shards of each, once though two devices have each; those of 3 bytes on a page each
    sizes = [event.nbytes for event in through_buffers if isinstance(event, Reserved)]
    assert sizes == [2 * MIB, 2 * MIB, 4 * PAGE]


def test_an_array_with_no_device_here_needs_no_memory():
    class Elsewhere:
        def addressable_devices_indices_map(self, shape):
            return {}

    class Stored:
        layout = type("Layout", (), {"shape": (4,), "dtype": np.dtype("float32")})

    leaf = type("Leaf", (), {"dtype": np.dtype("float32"), "sharding": Elsewhere()})()
    target = _Target("x", Stored, leaf)
    assert target.nbytes == 0 and target.parts(host_array) == []
    assert list(_groups([target])) == [[target]]


def test_restoring_into_given_arrays_allocates_but_one_extent_a_thread(store, traced):
    tree = {f"{i}": numbers(i) for i in range(8)}
    store.save(1, tree, block=True)
    into = {name: np.zeros_like(x) for name, x in tree.items()}
    peak, _ = peak_of(traced, lambda: store.restore(1, into))
    assert peak <= SLACK  # whole rows: each extent is read to where it belongs
    across = {name: np.zeros_like(x, order="F") for name, x in tree.items()}
    peak, held = peak_of(traced, lambda: store.restore(1, across))
    assert peak <= store.place.workers * (MIB // 4 + PAGE) + SLACK and held <= SLACK
    for name in tree:
        np.testing.assert_array_equal(into[name], tree[name])
        np.testing.assert_array_equal(across[name], tree[name])
