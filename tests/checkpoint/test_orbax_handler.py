"""Our checkpoints under Orbax's CheckpointManager: kept, chosen, deleted and committed by it."""

import collections
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from whalejax.checkpoint import DamagedError, WhaleHandler, WhaleRestore, WhaleSave, saving
from whalejax.checkpoint.layout import extent_file
from whalejax.checkpoint.orbax_handler import read_manifest
from whalejax.kernels.quantization import QuantizedArray

PROCESSES = 2


def sharded(devices, spec=("x",)):
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(*spec))


def tree(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (8, 130), np.uint8)
    return {
        "w": jax.device_put(rng.standard_normal((8, 6), np.float32), sharded(4)),
        "q": QuantizedArray(
            jnp.asarray(bits.view(jnp.float8_e4m3fn)), jnp.ones((1, 2), jnp.float32)
        ),
        "rng": jax.random.key(seed),
        "opt": [jnp.asarray(bits[0, :6].view(jnp.bfloat16)), None, np.float32(seed)],
        "epoch": seed,
    }


def bits(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    return leaf.dtype.name, leaf.shape, leaf.tobytes()


def same(a, b):
    assert jax.tree.map(bits, a) == jax.tree.map(bits, b)


def manager(path, *, handlers=None, **options):
    handlers = WhaleHandler(extent_bytes=64) if handlers is None else handlers
    options = ocp.CheckpointManagerOptions(create=True, **options)
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


@pytest.mark.parametrize("enable_async_checkpointing", [True, False])
def test_the_newest_steps_are_kept_and_restored_bitwise(tmp_path, enable_async_checkpointing):
    options = {"max_to_keep": 2, "enable_async_checkpointing": enable_async_checkpointing}
    with manager(tmp_path, **options) as m:
        for step in range(4):
            assert m.save(step, args=WhaleSave(tree(step), step=step))
        m.wait_until_finished()
        assert m.all_steps() == [2, 3] and m.latest_step() == 3
        for step in (2, 3):
            same(m.restore(step, args=WhaleRestore(tree(0))), tree(step))
        nested = m.restore(3)
        same(nested["opt"]["0"], tree(3)["opt"][0])
        assert nested["epoch"] == 3 and type(nested["w"]) is np.ndarray
    assert read_manifest(tmp_path / "3" / "default")[1].step == 3


@pytest.mark.parametrize(("best_mode", "kept"), [("min", [1, 3]), ("max", [0, 2])])
def test_the_best_steps_are_kept(tmp_path, best_mode, kept):
    losses = [3.0, 1.0, 4.0, 2.0]
    options = {"max_to_keep": 2, "best_fn": lambda metrics: metrics["loss"], "best_mode": best_mode}
    with manager(tmp_path, **options) as m:
        for step, loss in enumerate(losses):
            m.save(step, args=WhaleSave(tree(step)), metrics={"loss": loss})
        m.wait_until_finished()
        assert m.all_steps() == kept
        best = losses.index(min(losses) if best_mode == "min" else max(losses))
        assert m.best_step() == best
        same(m.restore(best, args=WhaleRestore(tree(0))), tree(best))


def test_save_policies_decide(tmp_path):
    policy = ocp.checkpoint_managers.save_decision_policy.SpecificStepsPolicy(steps=(1, 4))
    with manager(tmp_path, save_decision_policy=policy) as m:
        saved = [step for step in range(6) if m.save(step, args=WhaleSave(tree(step)))]
        m.wait_until_finished()
        assert saved == m.all_steps() == [1, 4]
    with manager(tmp_path / "every", save_interval_steps=3) as m:
        assert [s for s in range(6) if m.save(s, args=WhaleSave(tree(s)))] == [0, 3]
        m.wait_until_finished()
        same(m.restore(3, args=WhaleRestore(tree(0))), tree(3))


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    go_on, write = threading.Event(), saving.write_extents

    def slow(*args):
        assert go_on.wait(30)
        return write(*args)

    monkeypatch.setattr(saving, "write_extents", slow)
    state = {"w": jax.device_put(jnp.arange(48.0).reshape(8, 6), sharded(4)), "host": np.arange(9)}
    expected = jax.tree.map(np.array, state)
    with manager(tmp_path) as m:
        m.save(0, args=WhaleSave(state))
        assert m.is_saving_in_progress() and not (tmp_path / "0").exists()
        state["w"].delete()  # as a step does that it is donated to
        state["host"][:] = -1
        go_on.set()
        m.wait_until_finished()
        same(m.restore(0), expected)


def test_items_and_metadata_lie_beside_each_other(tmp_path):
    shared = WhaleHandler(extent_bytes=64)
    handlers = {"ema": shared, "state": shared, "config": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(
        state=WhaleSave(tree(1), metadata={"of": "state"}),
        ema=WhaleSave(tree(2)),
        config=ocp.args.JsonSave({"layers": 3}),
    )
    with manager(tmp_path, handlers=handlers) as m:
        for step in (0, 1):
            m.save(step, args=items, custom_metadata={"git": "abc"})
        m.wait_until_finished()
        restored = m.restore(
            1,
            args=ocp.args.Composite(
                state=WhaleRestore(tree(0)),
                ema=WhaleRestore(tree(0)),
                config=ocp.args.JsonRestore(),
            ),
        )
        same(restored.state, tree(1))
        same(restored.ema, tree(2))
        assert restored.config == {"layers": 3}
        assert m.metadata(1).custom_metadata == {"git": "abc"}
        described = m.item_metadata(1).state
        assert described.metadata == {"of": "state"}
        same(m.restore(1, args=ocp.args.Composite(ema=WhaleRestore(described.tree))).ema["w"],
             tree(2)["w"])  # fmt: skip


def test_the_metadata_is_an_abstract_tree(tmp_path):
    with manager(tmp_path) as m:
        m.save(0, args=WhaleSave(tree(0)))
        m.wait_until_finished()
        found = m.item_metadata(0).tree
    assert found["w"] == jax.ShapeDtypeStruct((8, 6), jnp.float32)
    assert found["rng"] == jax.eval_shape(lambda: jax.random.key(0))
    assert isinstance(found["q"], QuantizedArray) and found["epoch"] == 0


def test_a_manager_without_handlers_finds_ours_by_the_arguments(tmp_path):
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(tmp_path, options=options) as m:
        m.save(0, args=WhaleSave(tree(4)))
        m.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as m:
        same(m.restore(0, args=WhaleRestore(tree(0))), tree(4))


@pytest.mark.parametrize("kind", [ocp.Checkpointer, ocp.AsyncCheckpointer])
def test_a_checkpointer_saves_one_tree(tmp_path, kind):
    with kind(WhaleHandler()) as checkpointer:
        checkpointer.save(tmp_path / "one", args=WhaleSave(tree(5)))
        if kind is ocp.AsyncCheckpointer:
            checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "one", args=WhaleRestore(tree(0))), tree(5))
        same(checkpointer.restore(tmp_path / "one")["w"], tree(5)["w"])
    theirs = json.loads((tmp_path / "one" / "_CHECKPOINT_METADATA").read_text())
    assert theirs["init_timestamp_nsecs"]  # from before ours was written


def test_other_shardings_dtypes_and_subtrees_are_restored(tmp_path):
    with manager(tmp_path) as m:
        m.save(0, args=WhaleSave(tree(6)))
        m.wait_until_finished()
        w = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharded(2, (None, "x")))
        restored = m.restore(0, args=WhaleRestore({"w": w}))
        assert restored["w"].sharding == w.sharding
        same(restored, {"w": tree(6)["w"].astype(jnp.bfloat16)})
        wrong = jax.ShapeDtypeStruct((8, 5), jnp.float32)
        with pytest.raises(ValueError, match="the item cannot be restored so: v is not in"):
            m.restore(0, args=WhaleRestore({"v": w, "w": wrong}))


def test_a_flipped_bit_is_never_restored(tmp_path):
    with manager(tmp_path) as m:
        m.save(0, args=WhaleSave(tree(7)))
        m.wait_until_finished()
        file = tmp_path / "0" / "default" / extent_file("w", (1, 0))
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
        with pytest.raises(DamagedError, match=r"array w, extent \(1, 0\)"):
            m.restore(0, args=WhaleRestore(tree(0)))
        with pytest.raises(DamagedError, match=r"array w, extent \(1, 0\)"):
            m.restore(0)
        m.restore(0, args=WhaleRestore(tree(0), verify=False))


def test_a_failed_save_is_told_and_leaves_the_last_step(tmp_path, monkeypatch):
    with manager(tmp_path) as m:
        m.save(0, args=WhaleSave(tree(0)))
        m.wait_until_finished()

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(saving, "write_extents", full)
            m.save(1, args=WhaleSave(tree(1)))
            with pytest.raises(OSError, match="No space left"):
                m.wait_until_finished()
    with manager(tmp_path) as m:
        assert m.all_steps() == [0]
        same(m.restore(0, args=WhaleRestore(tree(1))), tree(0))
        m.save(1, args=WhaleSave(tree(1)))
        m.wait_until_finished()
        same(m.restore(1, args=WhaleRestore(tree(0))), tree(1))


TWICE = collections.OrderedDict({1: np.ones(1), "1": np.ones(1)})


@pytest.mark.parametrize(
    ("item", "metadata", "error", "fault"),
    [
        ({"f": len}, None, TypeError, "not f: builtin_function_or_method"),
        (TWICE, None, ValueError, "several leaves are named 1"),
        ({}, {1j: 2}, ValueError, "is no JSON"),
    ],
)
def test_mistakes_are_told_before_orbax_begins(item, metadata, error, fault):
    with pytest.raises(error, match=fault):
        WhaleSave(item, metadata=metadata)
    with pytest.raises(ValueError, match="extent_bytes=0, timeout_s=30.0 must be positive"):
        WhaleHandler(extent_bytes=0)


def test_a_folder_that_is_not_ours_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no item of ours"):
        WhaleHandler().restore(tmp_path)


def test_two_processes_save_and_one_restores(in_processes, tmp_path):
    script = Path(__file__).parent / "orbax_on_processes.py"
    processes = in_processes(script, PROCESSES, tmp_path, devices=2)
    printed = ["".join(process.communicate(timeout=120)) for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, printed
    expected = np.arange(64, dtype=np.float32).reshape(8, 8)
    with manager(tmp_path) as m:
        assert m.all_steps() == [1, 2]
        same(m.restore(2), {"w": expected + 2, "whole": np.arange(5), "epoch": 2})
    files = {p.name for p in (tmp_path / "2" / "default" / "parts").rglob("*") if p.is_file()}
    assert not files
    assert "OSError: saving" in printed[0] and "process 1: OSError: [Errno 5] broken" in printed[0]
    assert "OSError: [Errno 5] broken" in printed[1]
