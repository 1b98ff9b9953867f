"""Safetensors directories from checkpoints and trees, and back: bitwise or refused."""

import functools
import json
import struct
import tracemalloc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from whalejax.checkpoint import (
    CheckpointStore,
    DamagedError,
    export_safetensors,
    import_safetensors,
    read_safetensors,
)
from whalejax.checkpoint.layout import extent_file
from whalejax.kernels.quantization import QuantizedArray
from whalejax.storage import safetensors_files
from whalejax.storage.safetensors_files import DTYPES, INDEX, find_tensors, write_file

PACKAGE_READS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1", "c8")


def noise(shape, dtype, seed=0):
    """Random bits, so also NaNs; of bools, of the two that there are."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype) == bool:
        return rng.integers(0, 2, shape).astype(bool)
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, nbytes, np.uint8).view(dtype).reshape(shape)


class State(NamedTuple):
    """A tree of several node types."""

    params: Any
    opt: Any
    step: Any


def example():
    mesh = jax.make_mesh((4,), ("x",))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    weights = jax.device_put(noise((8, 6, 5), jnp.bfloat16), sharded)
    q = QuantizedArray(
        jnp.asarray(noise((2, 200, 130), jnp.float8_e4m3fn, 1)),
        jnp.asarray(np.random.default_rng(2).random((2, 2, 2), np.float32)),
    )
    params = {"w": weights, "q": q, "by.column": q.with_scales_by_column(), "": {"a/b": q.scales}}
    return State(
        params, (jnp.int32(3), None, [np.float64(2.5)]), {"epoch": 7, "name": "a", "x": 0.5}
    )


def same(a, b):
    flat, other = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [p for p, _ in flat] == [p for p, _ in other]
    for (path, x), (_, y) in zip(flat, other, strict=True):
        if isinstance(x, int | float | str):
            assert x == y, path
        else:
            assert np.asarray(x).dtype == np.asarray(y).dtype, path
            assert np.asarray(x).shape == np.asarray(y).shape, path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def as_imported(state):
    """What an import gives of the example: nested dicts, scales row by row."""
    q = jax.tree.map(np.asarray, state.params["q"])
    return {
        "opt": {"0": np.asarray(state.opt[0]), "2": {"0": np.asarray(state.opt[2][0])}},
        "params": {
            "": {"a/b": np.asarray(q.scales)},
            "by.column": q,
            "q": q,
            "w": np.asarray(state.params["w"]),
        },
        "step": state.step,
    }


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000, 1], ids=["one", "some", "each its own"])
@pytest.mark.parametrize("of_step", [False, True], ids=["tree", "step"])
def test_a_state_goes_there_and_back(tmp_path, of_step, max_shard_bytes):
    state, store = example(), CheckpointStore(tmp_path / "run", extent_bytes=1000)
    store.save(5, state, block=True)
    source = store if of_step else state
    export_safetensors(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert (INDEX in files) == (max_shard_bytes < 10**9)
    assert len(files) == {10**9: 1, 60_000: 3, 1: 9}[max_shard_bytes]
    same(read_safetensors(tmp_path / "out"), as_imported(state))
    import_safetensors(tmp_path / "out", store, 6, metadata={"from": "out"})
    assert store.manifest(6).metadata == {"from": "out"}
    same(store.restore(6), as_imported(state))
    like = state._replace(params={n: x for n, x in state.params.items() if n != "by.column"})
    same(store.restore(6, like), like)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_format_is_kept_bitwise(tmp_path, name):
    array = noise((3, 5), DTYPES[name])
    export_safetensors({"x": array, "none": array[:0], "one": array[0, 0]}, tmp_path / "out")
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:2000]
    assert f'"dtype":"{name}"'.encode() in header
    store = CheckpointStore(tmp_path / "run")
    import_safetensors(tmp_path / "out", store, 0)
    same(store.restore(0), {"none": array[:0], "one": array[0, 0], "x": array})


def test_the_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    tree = {d: noise((4, 3), d) for d in PACKAGE_READS}
    export_safetensors(tree, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    same(safetensors.numpy.load_file(file), tree)
    theirs = {f"layer.{d}": x for d, x in tree.items()}
    theirs["layer.BF16"] = noise((7,), ml_dtypes.bfloat16)
    (tmp_path / "theirs").mkdir()
    safetensors.numpy.save_file(theirs, tmp_path / "theirs" / "a.safetensors")
    expected = {"layer": {n.removeprefix("layer."): x for n, x in theirs.items()}}
    same(read_safetensors(tmp_path / "theirs"), expected)
    same(read_safetensors(tmp_path / "theirs" / "a.safetensors"), expected)


@pytest.mark.parametrize(
    ("subtree", "names"),
    [
        ("params/q", ["", "_scale_inv"]),
        ("params/w", [""]),
        ("opt", ["0", "2.0"]),
        ("params", ["w", "q", "q_scale_inv", "by.column", "by.column_scale_inv", ".a/b"]),
    ],
)
def test_a_subtree_is_named_from_where_it_begins(tmp_path, subtree, names):
    store = CheckpointStore(tmp_path / "run")
    store.save(1, example(), block=True)
    export_safetensors(store, tmp_path / "out", step=1, subtree=subtree)
    assert sorted(find_tensors(tmp_path / "out")) == sorted(names)
    whole = as_imported(example())
    for key in subtree.split("/"):
        whole = whole[key]
    found = read_safetensors(tmp_path / "out")
    same(found, whole)


def test_names_can_be_given(tmp_path):
    tree = {"a": {"b": np.arange(3)}, "c": np.arange(2)}
    export_safetensors(tree, tmp_path / "out", name=lambda leaf: f"model.{leaf.replace('/', '_')}")
    assert list(find_tensors(tmp_path / "out")) == ["model.a_b", "model.c"]
    same(read_safetensors(tmp_path / "out"), tree)
    same(
        read_safetensors(tmp_path / "out", name=lambda t: t.removeprefix("model.")),
        {"a_b": tree["a"]["b"], "c": tree["c"]},
    )


def test_published_fp8_files_become_quantised_arrays(tmp_path):
    values, scales = noise((130, 256), ml_dtypes.float8_e4m3fn), np.ones((2, 2), np.float32)
    arrays = {"m.weight": values, "m.weight_scale_inv": scales, "n_scale_inv": scales}
    write_file(tmp_path / "model.safetensors", specs(arrays), arrays.values())
    tree = read_safetensors(tmp_path)
    assert tree["m"]["weight"].tile == (128, 128)
    same(tree, {"m": {"weight": QuantizedArray(values, scales)}, "n_scale_inv": scales})
    with pytest.raises(ValueError, match=r"m.weight \[130, 256\] in tiles \(1, 128\)"):
        read_safetensors(tmp_path, tile=(1, 128))


def specs(arrays):
    return {n: (a.dtype, a.shape) for n, a in arrays.items()}


def test_what_was_not_quantised_is_not_afterwards(tmp_path):
    tree = {"w": noise((4, 4), ml_dtypes.float8_e4m3fn), "w_scale_inv": np.ones((1, 1), np.float32)}
    export_safetensors(tree, tmp_path / "out")
    same(read_safetensors(tmp_path / "out"), tree)


@pytest.mark.parametrize("of_step", [False, True], ids=["tree", "step"])
def test_one_error_lists_all_that_the_format_cannot_hold(tmp_path, of_step):
    tree = {
        "fine": jnp.ones(3),
        "small": jnp.zeros(4, jnp.int4),
        "rng": jax.random.key(0),
        "odd": np.zeros(3, ml_dtypes.float8_e3m4),
    }
    if of_step:
        store = CheckpointStore(tmp_path / "run")
        store.save(0, tree, block=True)
    with pytest.raises(ValueError, match="3 leaves cannot be exported") as error:
        export_safetensors(store if of_step else tree, tmp_path / "out")
    for told in ("rng is PRNG keys", "small is int4", "odd is float8_e3m4"):
        assert told in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"step": 3}, "step=3 is for a CheckpointStore, not for a dict"),
        ({"subtree": "b"}, "no subtree 'b'; nodes at the top: a"),
        ({"name": lambda leaf: "x"}, "several leaves get the names x"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be positive"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault):
        export_safetensors({"a": [np.ones(1), np.ones(1)]}, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="no array"):
        export_safetensors({"n": 3}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_store_without_the_step_is_refused(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        export_safetensors(store, tmp_path / "out")
    store.save(2, {"a": np.ones(1)}, block=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; its steps: 2"):
        export_safetensors(store, tmp_path / "out", step=3)


def test_only_a_directory_of_safetensors_is_replaced_and_only_if_asked(tmp_path):
    out = tmp_path / "out"
    export_safetensors({"a": np.zeros(3)}, out, max_shard_bytes=1)
    with pytest.raises(ValueError, match="exists"):
        export_safetensors({"a": np.ones(3)}, out)
    export_safetensors({"a": np.ones(3)}, out, overwrite=True)
    same(read_safetensors(out), {"a": np.ones(3)})
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds mine.txt beside safetensors"):
        export_safetensors({"a": np.zeros(3)}, out, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        export_safetensors({"a": np.zeros(3)}, out / "mine.txt")
    same(read_safetensors(out), {"a": np.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch):
    out, original, left = tmp_path / "out", safetensors_files.write_file, [1]

    def full(*args):
        if not left.pop():
            raise OSError("no space left")
        original(*args)
        left.append(0)

    export_safetensors({"a": np.ones(3)}, out)
    monkeypatch.setattr(safetensors_files, "write_file", full)
    with pytest.raises(OSError, match="no space"):
        export_safetensors(
            {"a": np.zeros(3), "b": np.ones(3)}, out, max_shard_bytes=1, overwrite=True
        )
    same(read_safetensors(out), {"a": np.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    store = CheckpointStore(tmp_path / "run", extent_bytes=64)
    store.save(0, {"a": np.zeros(4), "b": np.arange(100)}, block=True)
    file = tmp_path / "run" / "0" / extent_file("b", (3,))
    data = bytearray(file.read_bytes())
    data[5] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"array b, extent \(3,\)"):
        export_safetensors(store, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def rewritten_header(file, change):
    """Changes a file's header, and nothing else of it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda h: h["a"].update(dtype="F4"), "dtype 'F4' is unknown"),
        (lambda h: h["a"].update(shape=[2]), "does not take 24 bytes"),
        (lambda h: h["__metadata__"].update(whalejax="{"), "corrupt note"),
        (lambda h: h["__metadata__"].update(whalejax='{"tiles":{"a":[0,1]}}'), "corrupt note"),
        (lambda h: h["__metadata__"].update(whalejax='{"leaves":{"a":3}}'), "corrupt note"),
        (lambda h: h["__metadata__"].update(whalejax='{"values":{"a":[]}}'), "corrupt note"),
        (lambda h: h["__metadata__"].update(whalejax="[]"), "corrupt note"),
        (lambda h: h["__metadata__"].update(whalejax='{"tiles":{"a":[1,8]}}'), "do not fit"),
        (lambda h: h["__metadata__"].update(whalejax='{"values":{"a":1}}'), "a would be several"),
        (lambda h: h["__metadata__"].update(whalejax=3), "no text by name"),
        (lambda h: h.update({"a.x": h.pop("b")}), "a would be a leaf and have others below it"),
    ],
)
def test_a_corrupt_file_is_told_and_nothing_is_saved(tmp_path, change, fault):
    export_safetensors({"a": np.ones(3), "b": np.ones(2)}, tmp_path / "out")
    rewritten_header(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(ValueError, match=fault):
        import_safetensors(tmp_path / "out", CheckpointStore(tmp_path / "run"), 0)
    assert not (tmp_path / "run").exists()


def test_a_shard_of_another_export_is_told(tmp_path):
    export_safetensors({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "x", max_shard_bytes=1)
    export_safetensors({"c": np.ones(3), "d": np.ones(3)}, tmp_path / "y", max_shard_bytes=1)
    shard = "model-00001-of-00002.safetensors"
    (tmp_path / "x" / shard).write_bytes((tmp_path / "y" / shard).read_bytes())
    with pytest.raises(ValueError, match="names 1 tensors that its files lack: a"):
        read_safetensors(tmp_path / "x")
    (tmp_path / "x" / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        read_safetensors(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        read_safetensors(tmp_path / "nowhere")


def test_a_step_that_is_there_is_not_imported_over(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.save(0, {"a": np.zeros(3)}, block=True)
    export_safetensors({"a": np.ones(3)}, tmp_path / "out")
    with pytest.raises(ValueError, match="step=0"):
        import_safetensors(tmp_path / "out", store, 0)
    same(store.restore(0), {"a": np.zeros(3)})


def test_the_host_holds_about_one_array(tmp_path):
    size, store = 2**22, CheckpointStore(tmp_path / "run")
    store.save(0, {str(i): np.full(size, i, np.uint8) for i in range(8)}, block=True)
    export = functools.partial(export_safetensors, store, tmp_path / "out")
    assert peak(export) < 2.5 * size  # the array at hand, and a reader's buffer
    assert peak(lambda: import_safetensors(tmp_path / "out", store, 1)) < size / 2
    same(store.restore(1), store.restore(0))


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_quantized_array_is_a_tree_of_its_own(tmp_path):
    whole = example().params["q"]
    export_safetensors(whole, tmp_path / "out")
    assert sorted(find_tensors(tmp_path / "out")) == ["", "_scale_inv"]
    same(read_safetensors(tmp_path / "out"), jax.tree.map(np.asarray, whole))
