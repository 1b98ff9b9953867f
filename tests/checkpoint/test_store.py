"""When a CheckpointStore does what it promises, and which steps it then holds."""

import gc
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.threads import Ending


def test_arrays_may_be_donated_and_changed_once_save_returns(store, spied, mesh):
    sharding = NamedSharding(mesh, P("x"))
    on_devices = jax.device_put(np.arange(256, dtype=np.float32), sharding)
    replicated = jax.device_put(np.arange(256, dtype=np.float32), NamedSharding(mesh, P()))
    on_host, metadata = np.arange(256), {"seen": [1]}
    spied.open.clear()
    tree = {"d": on_devices, "r": replicated, "h": on_host}
    store.save(1, tree, metadata=metadata)
    on_host[:] = -1
    metadata["seen"].append(2)
    again = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    after = jax.block_until_ready([again(on_devices), again(replicated)])
    assert on_devices.is_deleted() and (np.asarray(after[0]) == -1).all()
    spied.open.set()
    store.wait()
    restored = store.restore(1)
    for name in "drh":
        np.testing.assert_array_equal(restored[name], np.arange(256))
    assert store.manifest(1).metadata == {"seen": [1]}


def test_what_was_restored_may_be_donated(store, mesh):
    x = jax.device_put(np.arange(4096, dtype=np.float32), NamedSharding(mesh, P()))
    store.save(1, {"x": x}, block=True)
    first, second = (store.restore(1, {"x": x})["x"] for _ in range(2))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for shard in add(first).addressable_shards:  # which all may lie in one host array
        np.testing.assert_array_equal(shard.data, np.arange(4096) + 1)
    np.testing.assert_array_equal(second, np.arange(4096))


def test_arrays_that_were_saved_are_not_kept_alive_by_the_save(store, spied):
    x = jnp.arange(1000.0) + 1
    alive = weakref.ref(x)
    spied.open.clear()
    store.save(1, {"x": x})
    del x
    gc.collect()
    assert alive() is None
    spied.open.set()


def test_a_save_waits_for_the_one_before_it(store, spied):
    spied.open.clear()
    store.save(1, {"x": np.full(100, 1)})
    begun, done = threading.Event(), threading.Event()

    def second():
        begun.set()
        store.save(2, {"x": np.full(100, 2)})
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert begun.wait(10) and not done.wait(0.2)
    assert spied.written == [] and store.steps() == []
    spied.open.set()
    thread.join()
    store.wait()
    of_steps = [name.split(".")[0] for name in spied.written]
    assert of_steps == sorted(of_steps) and set(of_steps) == {"1", "2"}
    for step in (1, 2):
        np.testing.assert_array_equal(store.restore(step)["x"], np.full(100, step))


def test_an_interrupted_wait_forgets_no_save(store, spied, monkeypatch):
    spied.open.clear()
    store.save(1, {"x": np.full(100, 1)})

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ending, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    threading.Timer(0.1, spied.open.set).start()
    store.save(2, {"x": np.full(100, 2)})  # would overwrite the copy that is being written
    store.wait()
    np.testing.assert_array_equal(store.restore(1)["x"], np.full(100, 1))


def test_a_failed_save_is_told_once_and_leaves_no_trace(store, spied):
    store.save(1, {"x": np.arange(100)}, block=True)
    spied.fails = "arrays/x/c/3"
    store.save(2, {"x": np.arange(100)})
    with pytest.raises(OSError, match="No space left"):
        store.save(3, {"x": np.arange(100)})
    store.wait()
    assert store.steps() == [1] and store.unfinished() == []
    spied.fails = None
    store.save(2, {"x": np.arange(100)})
    store.wait()
    assert store.steps() == [1, 2]
    spied.fails = "zarr.json"
    with pytest.raises(OSError, match="No space left"):
        store.save(3, {"x": np.arange(100)}, block=True)


def test_leaving_the_store_waits_and_raises(store, spied):
    with store:
        store.save(1, {"x": np.arange(10)})
    assert store.steps() == [1]
    spied.fails = "arrays"
    store.save(2, {"x": np.arange(10)})
    with pytest.raises(OSError, match="No space left"):
        store.__exit__(None, None, None)


def test_leaving_the_store_with_an_error_waits_and_raises_nothing_else(store, spied):
    store.save(1, {"x": np.arange(10)})
    store.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert store.steps() == [1]
    spied.fails = "arrays"
    store.save(2, {"x": np.arange(10)})
    store.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    with pytest.raises(OSError, match="No space left"):
        store.wait()


LAST_LINE = """
import sys
import numpy as np
from whalejax.checkpoint import CheckpointStore
good, bad = CheckpointStore(sys.argv[1], extent_bytes=2**16), CheckpointStore(sys.argv[2])
def write(*_):
    raise OSError(28, "No space left on device")
bad.place.write = write
bad.save(1, {"x": np.zeros(10)})
good.save(1, {"x": np.arange(2**20)})
"""


@pytest.mark.skipif(
    sys.version_info[:3] in ((3, 12, 0), (3, 12, 1)),
    reason="these versions of Python start no threads while the interpreter ends",
)
def test_a_save_in_a_script_s_last_line_is_finished_or_its_error_shown(tmp_path):
    command = [sys.executable, "-c", LAST_LINE, tmp_path / "good", tmp_path / "bad"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    good, bad = CheckpointStore(tmp_path / "good"), CheckpointStore(tmp_path / "bad")
    np.testing.assert_array_equal(good.restore()["x"], np.arange(2**20))
    assert bad.steps() == [] and "No space left on device" in shown


def test_steps_and_latest_name_complete_checkpoints_in_order(store, tmp_path):
    assert store.steps() == [] and store.latest() is None
    for step in (10, 9, 100):
        store.save(step, {"x": np.full(3, step)}, block=True)
    (tmp_path / "run" / "11").mkdir()
    (tmp_path / "run" / "101.saving").mkdir()
    (tmp_path / "run" / "notes").mkdir()
    assert store.steps() == [9, 10, 100] and store.latest() == 100
    np.testing.assert_array_equal(store.restore()["x"], np.full(3, 100))
    np.testing.assert_array_equal(store.restore(9)["x"], np.full(3, 9))


def test_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(4):
        store.save(step, {"x": np.arange(3)})
    store.wait()
    assert store.steps() == [2, 3]
    store.save(1, {"x": np.arange(3)}, block=True)  # the run went back: it wants this one
    assert store.steps() == [1, 2, 3]
    store.save(4, {"x": np.arange(3)}, block=True)
    assert store.steps() == [3, 4]


def test_removed_steps_are_gone_and_can_be_saved_again(store):
    for step in (1, 2):
        store.save(step, {"x": np.arange(3)}, block=True)
    store.remove(1)
    assert store.steps() == [2] and store.unfinished() == []
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 1"):
        store.remove(1)
    store.save(1, {"x": np.arange(3)}, block=True)
    assert store.steps() == [1, 2]


def test_a_step_is_removed_whatever_was_left_of_it(store, tmp_path):
    store.save(1, {"x": np.arange(3)}, block=True)
    (tmp_path / "run" / "1.deleting" / "arrays").mkdir(parents=True)
    (tmp_path / "run" / "1.deleting" / "arrays" / "x").write_text("left over")
    store.remove(1)
    assert store.steps() == [] and store.unfinished() == []


def test_clean_deletes_what_was_killed_and_nothing_else(store, tmp_path):
    folders = ["3.saving", "4.deleting", "mine.saving", ".saving", "5", "notes"]
    for name in folders:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "file").write_text("x")
    assert store.unfinished() == ["3.saving", "4.deleting"]
    store.clean()
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == sorted(folders[2:]) and store.unfinished() == []
