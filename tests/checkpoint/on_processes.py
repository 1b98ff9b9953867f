"""One process of a job that saves and restores: `on_processes.py NUMBER COUNT PORT PLAN`.

PLAN is JSON: the store's `url`, the `timeout_s`, and which process is to be `killed` in the middle
of its second save, or -1. Every process prints what became of each save, as JSON.
"""

import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.manifest import MANIFEST
from whalejax.checkpoint.saving import WRITTEN
from whalejax.parallel.runtime import key_value_store

SHAPE = (64, 48)


def values(step):
    """An array of a step, on the host."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + step


def tree(step, mesh):
    """Arrays cut over all devices, over some, and whole on each; a number beside them."""

    def placed(*spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(SHAPE, sharding, values(step).__getitem__)

    cut = {"both": placed("a", "b"), "one": placed(None, "b"), "none": placed(None, None)}
    return cut | {"bf16": jnp.asarray(values(step), jnp.bfloat16), "step": step}


def die_in_the_middle(store):
    """From now on this process dies when it has written half of its files."""
    write, count = store.place.write, [0]

    def dying(*args, **kwargs):
        count[0] += 1
        if count[0] > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args, **kwargs)

    store.place.write = dying


def whole_again(store, step, mesh):
    """Whether a step restores onto another cut as it was saved."""
    sharding = NamedSharding(mesh, P("b", "a"))
    like = {n: jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding) for n in ("both", "one")}
    found = store.restore(step, like)
    return all(
        np.array_equal(np.asarray(shard.data), values(step)[shard.index])
        for array in found.values()
        for shard in array.addressable_shards
    )


def main(number, count, port, plan):
    """Saves twice; looks at what is left."""
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number, heartbeat_timeout_seconds=100)
    mesh = jax.make_mesh((count, 2), ("a", "b"))
    store = CheckpointStore(plan["url"], extent_bytes=512, timeout_s=plan["timeout_s"])
    store.save(1, tree(1, mesh))
    store.wait()
    written = store.manifest(1)
    print(json.dumps({"latest": store.latest(), "arrays": len(written.arrays)}), flush=True)
    if plan["killed"] == number:
        die_in_the_middle(store)
    begun = time.monotonic()
    try:
        store.save(2, tree(2, mesh))
        store.wait()
        said = "saved"
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    steps = [1, 2] if said == "saved" else [1]
    right = all(whole_again(store, step, mesh) for step in steps)
    left = {"said": said, "seconds": seconds, "right": right, "steps": store.steps()}
    kept = key_value_store().key_value_dir_get("whalejax/meeting/")
    left["reports_left"] = sum(f"/{WRITTEN}/" in key for key, _ in kept)
    left["complete"] = store.place.size(f"2/{MANIFEST}") is not None
    print(json.dumps(left), flush=True)
    if said != "saved":
        time.sleep(5 if number == 0 else 0)  # JAX ends the others when its coordinator goes
        os._exit(3)  # jax.distributed would wait for the dead one


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(sys.argv[4]))
