"""Checkpoints that Orbax wrote itself: found, read bitwise, imported, and never deleted by us."""

import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from whalejax.checkpoint import (
    CheckpointStore,
    WhaleHandler,
    WhaleSave,
    import_orbax,
    orbax_folders,
    read_orbax,
)
from whalejax.storage.files import Files


class State(NamedTuple):
    """A tree of several node types."""

    params: Any
    opt: Any
    step: Any


def sharded(devices, spec=("x",)):
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(*spec))


def example(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w": jax.device_put(rng.standard_normal((8, 6), np.float32), sharded(4)),
        "b": [jnp.arange(3, dtype=jnp.bfloat16), jnp.ones((2, 2), jnp.float8_e4m3fn)],
        "words": jnp.arange(4, dtype=jnp.uint32),
        "wide": rng.standard_normal(5),
        "long": np.arange(3) + 2**40,
    }
    return State(params, (jax.random.key(seed), None, {}), jnp.int32(seed))


def bits(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", *bits(jax.random.key_data(leaf))
    leaf = np.asarray(leaf)
    return leaf.dtype.name, leaf.shape, leaf.tobytes()


def same(a, b):
    assert [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


def nested(state):
    return {
        "params": jax.tree.map(np.asarray, state.params),
        "opt": [state.opt[0], None, {}],
        "step": np.asarray(state.step),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 0 to 2 of a run, as training saved them before there was a format of ours."""
    path = tmp_path_factory.mktemp("orbax") / "run"
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(create=True)) as m:
        for step in range(3):
            m.save(step, args=ocp.args.StandardSave(example(step)))
    return path


@pytest.mark.parametrize("use_zarr3", [False, True], ids=["zarr2", "zarr3"])
@pytest.mark.parametrize("use_ocdbt", [False, True], ids=["a file each", "ocdbt"])
def test_every_format_of_orbax_is_read_bitwise(tmp_path, use_ocdbt, use_zarr3):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    tree = {"state": example(3)._asdict(), "n": 3, "f": 1.5, "s": "text"}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "one", args=ocp.args.PyTreeSave(tree))
    found = read_orbax(tmp_path / "one")
    same({k: found["state"][k] for k in State._fields}, nested(example(3)))
    assert (found["n"], found["f"], found["s"]) == (3, 1.5, "text")
    assert type(found["state"]["params"]["words"]) is np.ndarray
    found = read_orbax(tmp_path / "one", like=tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    same(found, tree)


def test_a_run_is_read_by_step_by_folder_and_by_item(run):
    same(read_orbax(run), nested(example(2)))
    same(read_orbax(str(run), 1), nested(example(1)))
    same(read_orbax(run / "0"), nested(example(0)))
    same(read_orbax(run / "0" / "default"), nested(example(0)))
    restored = read_orbax(run, 1, example(0))
    assert type(restored) is State
    same(restored, example(1))


def test_other_shardings_dtypes_and_subtrees_are_read(run):
    w = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharded(2, (None, "x")))
    plain = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    memory = np.zeros(5, np.float32)
    like = State({"w": w, "b": [plain], "wide": memory}, None, np.zeros((), np.int32))
    restored = read_orbax(run, 2, like)
    assert restored.params["w"].sharding == w.sharding
    same(restored.params["w"], example(2).params["w"].astype(jnp.bfloat16))
    assert restored.params["b"][0].devices() == {jax.devices()[0]}
    assert restored.params["wide"] is memory
    same(memory, example(2).params["wide"].astype(np.float32))
    assert restored.step is like.step and like.step == 2


def test_one_error_lists_all_that_does_not_fit(run):
    like = {
        "params": {"w": np.zeros((6, 8), np.float32), "v": np.zeros(3)},
        "step": np.zeros((), np.float32),
        "opt": [np.zeros(2, np.uint32)],
    }
    with pytest.raises(ValueError, match="cannot be restored so") as error:
        read_orbax(run, like=like)
    for told in (
        "params/v is not in the checkpoint",
        "params/w has shape [8, 6], not [6, 8]",
        "step is int32, which does not become float32",
    ):
        assert told in str(error.value)
    words = {"params": {"words": jax.random.key(0, impl="rbg")}}  # of four words
    with pytest.raises(ValueError, match="params/words cannot be restored so: it is no PRNG keys"):
        read_orbax(run, like=words)
    with pytest.raises(ValueError, match="opt/0 cannot be .* it is an array of PRNG keys"):
        read_orbax(run, like={"opt": [jax.ShapeDtypeStruct((2,), np.uint32)]})


def test_what_is_not_there_is_told(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no step 7 of Orbax; its steps: 0, 1, 2"):
        read_orbax(run, 7)
    with pytest.raises(FileNotFoundError, match="no item that is a tree; its trees: none"):
        read_orbax(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of Orbax; its steps: none"):
        import_orbax(tmp_path, CheckpointStore(tmp_path / "store"))
    with pytest.raises(FileNotFoundError, match="no ema that is a tree; its trees: default"):
        read_orbax(run, 1, item="ema")


def test_items_are_named_where_there_are_several(tmp_path):
    options = ocp.CheckpointManagerOptions(
        create=True, step_prefix="step", step_format_fixed_length=4
    )
    with ocp.CheckpointManager(tmp_path, options=options) as m:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"a": np.arange(3)}),
            ours=WhaleSave({"a": np.arange(4)}),
            config=ocp.args.JsonSave({"x": 1}),
        )
        m.save(12, args=items)
    assert (tmp_path / "step_0012").exists()
    with pytest.raises(ValueError, match="holds ours, state: name the item"):
        read_orbax(tmp_path)
    same(read_orbax(tmp_path, item="state"), {"a": np.arange(3)})
    same(read_orbax(tmp_path, 12, item="ours"), {"a": np.arange(4)})
    same(read_orbax(tmp_path / "step_0012", item="ours"), {"a": np.arange(4)})
    with pytest.raises(FileNotFoundError, match="no config that is a tree; its trees: ours, state"):
        read_orbax(tmp_path, item="config")


def test_a_step_is_imported_and_restored_as_the_tree_it_was(run, tmp_path):
    store = CheckpointStore(tmp_path / "store")
    assert import_orbax(run, store, metadata={"from": "orbax"}) == 2
    assert import_orbax(run, store, 1, example(0)) == 1
    assert store.steps() == [1, 2] and store.manifest(2).metadata == {"from": "orbax"}
    for step in (1, 2):
        same(store.restore(step, example(0)), example(step))
    with pytest.raises(ValueError, match="holds a checkpoint of step 2 already"):
        import_orbax(run, store, 2)
    with pytest.raises(ValueError, match="give a store elsewhere"):
        import_orbax(run, CheckpointStore(run))


def test_steps_of_ours_in_the_same_run_are_left_alone(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(create=True)) as m:
        m.save(3, args=ocp.args.StandardSave({"a": np.arange(3)}))
    CheckpointStore(tmp_path).save(5, {"a": np.arange(5)}, block=True)
    same(read_orbax(tmp_path), {"a": np.arange(3)})
    assert CheckpointStore(tmp_path).steps() == [5]


def test_a_store_in_an_old_run_says_who_reads_it(run):
    store = CheckpointStore(run)
    assert store.steps() == [] and store.latest() is None
    told = r"Orbax wrote steps 0, 1, 2 there: whalejax.checkpoint.read_orbax reads them"
    with pytest.raises(FileNotFoundError, match=f"holds no complete checkpoint.*{told}"):
        store.restore()
    with pytest.raises(
        FileNotFoundError, match=f"no checkpoint of step 1; its steps: none.*{told}"
    ):
        store.restore(1)
    with pytest.raises(ValueError, match="step=1 is in .* already, saved by Orbax"):
        store.save(1, {})
    assert sorted(path.name for path in run.iterdir()) == ["0", "1", "2"]


def test_a_store_that_cannot_rename_does_not_clean_away_an_old_run(tmp_path):
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(tmp_path, options=options) as m:
        m.save(0, args=ocp.args.StandardSave({"a": np.arange(3)}))
    (tmp_path / "1" / "arrays").mkdir(parents=True)
    (tmp_path / "1" / "arrays" / "half").write_bytes(b"x")
    store = CheckpointStore(tmp_path)
    store.place = Bucket(tmp_path)
    assert store.unfinished() == ["1"]
    store.clean()
    same(read_orbax(tmp_path, 0), {"a": np.arange(3)})


class Bucket(Files):
    """Files without renames, as an object store is."""

    renames = False


def test_the_steps_of_a_folder_are_those_that_are_complete(run, tmp_path):
    assert orbax_folders.orbax_steps(Files(run)) == {0: "0", 1: "1", 2: "2"}
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "4").mkdir()
    assert orbax_folders.orbax_steps(Files(tmp_path)) == {}
    assert orbax_folders.is_orbax(Files(tmp_path), "3.orbax-checkpoint-tmp")
    assert not orbax_folders.is_orbax(Files(tmp_path), "4")


def test_float8_outside_of_orbax_is_kept_by_ours(tmp_path):
    tree = {"x": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e3m4)}
    with ocp.CheckpointManager(
        tmp_path,
        options=ocp.CheckpointManagerOptions(create=True),
        item_handlers=WhaleHandler(),
    ) as m:
        m.save(0, args=WhaleSave(tree))
    same(read_orbax(tmp_path), tree)
    same(read_orbax(tmp_path, like={"x": np.zeros(256, ml_dtypes.float8_e3m4)}), tree)


def test_checkpoints_do_without_orbax():
    code = "import sys, whalejax.checkpoint; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
