"""Checkpoints in an S3 bucket, served on loopback: there the manifest, written last, commits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax import storage
from whalejax.checkpoint import CheckpointStore, DamagedError
from whalejax.checkpoint.manifest import MANIFEST


def tree(step=0):
    rng = np.random.default_rng(step)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    cut = NamedSharding(mesh, P("a", "b"))
    return {
        "w": jax.device_put(rng.standard_normal((64, 48), np.float32), cut),
        "f8": jnp.asarray(rng.standard_normal((40, 9)), jnp.float8_e4m3fn),
        "key": jax.random.key(step),
        "step": step,
    }


def equal(found, wanted):
    assert (np.asarray(found["w"]) == np.asarray(wanted["w"])).all()
    assert np.asarray(found["f8"]).tobytes() == np.asarray(wanted["f8"]).tobytes()
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(wanted["key"])).all()
    assert found["step"] == wanted["step"]


def test_saves_restores_thins_out_and_removes(s3_url):
    store = CheckpointStore(s3_url, keep=2, extent_bytes=1024)
    for step in range(3):
        store.save(step, tree(step), metadata={"step": step})
    store.wait()
    assert store.steps() == [1, 2]
    again = CheckpointStore(s3_url)
    assert again.latest() == 2
    assert again.manifest(2).metadata == {"step": 2}
    equal(again.restore(), tree(2))
    equal(again.restore(1, tree(7) | {"step": 0}), tree(1))
    again.remove(1)
    assert again.steps() == [2]
    assert not [name for name in again.place.names("") if not name.startswith("2/")]


def test_a_step_without_a_manifest_is_none_and_is_gone_on_with(s3_url, monkeypatch):
    store = CheckpointStore(s3_url, extent_bytes=1024)
    store.save(0, tree(0), block=True)
    store.save(1, tree(1), block=True)
    place = storage.open(s3_url)
    place.remove(f"1/{MANIFEST}")  # as a kill before the commit leaves it
    lost = next(name for name in place.names("1") if "/w/c/" in name)
    place.remove(lost)
    assert store.steps() == [0]
    assert store.unfinished() == ["1"]
    written, write = [], store.place.write

    def spy(name, *args):
        written.append(name)
        return write(name, *args)

    monkeypatch.setattr(store.place, "write", spy)
    store.save(1, tree(1), block=True)
    assert written == [lost]
    equal(store.restore(1), tree(1))


def test_a_manifest_is_never_replaced(s3_url):
    first, second = CheckpointStore(s3_url), CheckpointStore(s3_url)
    first.save(0, tree(0), block=True)
    with pytest.raises(ValueError, match="step=0"):
        second.save(0, tree(1), block=True)
    equal(second.restore(0), tree(0))


def test_damage_is_named(s3_url):
    store = CheckpointStore(s3_url, extent_bytes=1024)
    store.save(0, tree(0), block=True)
    name = next(name for name in store.place.names("0") if "/w/c/" in name)
    data = bytearray(store.place.get(name))
    data[7] ^= 1
    store.place.put(name, bytes(data))
    with pytest.raises(DamagedError, match="array w"):
        store.restore(0)


def test_a_bucket_that_is_not_there_is_told(s3_endpoint):
    options = f"endpoint={s3_endpoint}&region=us-east-1&anonymous=true"
    store = CheckpointStore(f"s3://no-such-bucket/run?{options}")
    with pytest.raises(OSError, match="no-such-bucket"):
        store.save(0, tree(0), block=True)
