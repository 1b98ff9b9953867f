"""Which files a CheckpointStore writes, keeps, deletes and reads."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import DamagedError
from whalejax.storage.files import Files


def killed_save(store, tree, step=1):
    """Leaves behind what a save had written when it was killed before the commit."""
    store.save(step, tree, block=True)
    complete = store.place.root / str(step)
    (complete / "manifest.json").unlink()
    complete.rename(complete.with_name(f"{step}.saving"))
    return complete.with_name(f"{step}.saving")


def test_files_that_are_right_are_not_written_again(store, spied):
    tree = {"x": np.arange(64), "y": np.arange(8)}
    left = killed_save(store, tree)
    (left / "arrays/x/c/2").write_bytes(b"\xff" * 64)
    (left / "arrays/x/c/3").write_bytes((left / "arrays/x/c/3").read_bytes()[:40])
    (left / "arrays/x/c/4").unlink()
    (left / "arrays/y/zarr.json").write_bytes(b"{}")
    spied.written.clear()
    store.save(1, tree)
    store.wait()
    assert sorted(spied.written) == [
        *(f"1.saving/arrays/x/c/{i}" for i in (2, 3, 4)),
        *("1.saving/arrays/y/zarr.json", "1.saving/manifest.json"),
    ]
    jax.tree.map(np.testing.assert_array_equal, store.restore(1), tree)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"x": np.arange(64)}, {"x": np.arange(16)}),  # fewer extents
        ({"x": np.arange(64), "z": np.arange(8)}, {"x": np.arange(64)}),  # fewer arrays
        ({"x": np.int64(1)}, {"x": np.arange(64)}),  # a folder where a file stood
        ({"x": np.arange(64)}, {"x": np.int64(1)}),  # a file where a folder stood
        ({"x": np.arange(8)}, {"x": {"c": {"0": np.arange(8)}}}),  # an array where an extent did
        ({"x": {"c": {"0": np.arange(8)}}}, {"x": np.arange(8)}),
    ],
    ids=["extents", "arrays", "folder", "file", "array", "extent"],
)
def test_what_a_killed_save_of_another_tree_left_is_cleaned(store, before, after):
    left = killed_save(store, before)
    (left / "parts").mkdir()
    (left / "parts" / "3.json").write_text("of a job of more processes")
    store.save(1, after)
    store.wait()
    jax.tree.map(np.testing.assert_array_equal, store.restore(1), after)
    place, manifest = Files(store.place.root), store.manifest(1)
    extents = sum(len(array.digests) for array in manifest.arrays.values())
    assert len(place.names("1")) == extents + len(manifest.arrays) + 1
    assert store.unfinished() == []


def test_what_a_killed_save_on_another_mesh_left_is_cleaned(store, mesh):
    x = np.arange(1024, dtype=np.float32).reshape(32, 32)
    store.extent_bytes = 1024
    killed_save(store, {"x": jax.device_put(x, NamedSharding(mesh, P(None, "x")))})
    tree = {"x": jax.device_put(x, NamedSharding(mesh, P("x")))}
    store.save(1, tree, block=True)
    assert store.manifest(1).arrays["x"].layout.grid == (8, 1)
    assert len(store.place.names("1")) == 8 + 2
    jax.tree.map(np.testing.assert_array_equal, store.restore(1, tree), tree)


def test_only_what_is_asked_for_is_read(store, spied, mesh):
    x = np.arange(256).reshape(16, 16)  # in int64: an extent is half a row
    store.save(1, {"x": x, "y": {"z": np.arange(8), "w": np.arange(8)}}, block=True)
    spied.read_files.clear()
    store.restore(1, {"y": {"z": np.zeros(8, int)}})
    assert spied.read_files == ["1/arrays/y/z/c/0"]
    spied.read_files.clear()
    store.restore(1)
    assert len(spied.read_files) == len(set(spied.read_files)) == 32 + 2
    assert set(spied.read_files) < set(spied.names("1"))


def test_each_extent_is_read_once_for_all_devices_that_need_it(store, spied, mesh):
    x = np.arange(256, dtype=np.float32).reshape(16, 16)  # an extent is a row
    store.save(1, {"x": x}, block=True)
    spied.read_files.clear()
    some = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for spec in (P("x"), P(None, "x"), P()):
        spied.read_files.clear()
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(some, spec))}
        np.testing.assert_array_equal(store.restore(1, like)["x"], x)
        assert sorted(spied.read_files) == sorted(f"1/arrays/x/c/{i}/0" for i in range(16))


def test_progress_counts_the_bytes_of_every_extent_that_is_read(store):
    store.save(1, {"x": np.arange(60), "y": np.float32(1)}, block=True)
    seen = []
    store.restore(1, progressed=seen.append)
    assert sum(seen) == store.manifest(1).nbytes == 64 * 8 + 4


def test_a_flipped_bit_is_named_unless_nothing_is_verified(store, tmp_path):
    store.save(1, {"x": np.arange(64), "y": np.arange(8)}, block=True)
    file = tmp_path / "run" / "1/arrays/x/c/3"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"arrays/x/c/3 \(array x, extent \(3,\)\): CRC32C"):
        store.restore(1)
    np.testing.assert_array_equal(store.restore(1, {"y": np.zeros(8, int)})["y"], np.arange(8))
    assert (store.restore(1, verify=False)["x"] != np.arange(64)).sum() == 1
