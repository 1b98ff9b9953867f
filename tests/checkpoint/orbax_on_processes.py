"""One of several processes that save with Orbax's CheckpointManager: RANK RANKS PORT FOLDER."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from whalejax.checkpoint import WhaleHandler, WhaleRestore, WhaleSave, saving


def main(rank, ranks, port, folder):
    """Saves three steps, keeps two, restores the last one on another sharding; then one fails."""
    jax.distributed.initialize(f"127.0.0.1:{port}", int(ranks), int(rank))
    mesh = jax.make_mesh((4,), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    host = np.arange(64, dtype=np.float32).reshape(8, 8)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False)
    handler = WhaleHandler(extent_bytes=64, timeout_s=10.0)
    with ocp.CheckpointManager(Path(folder), options=options, item_handlers=handler) as manager:
        for step in range(3):
            w = jax.make_array_from_callback((8, 8), rows, (host + step).__getitem__)
            tree = {"w": w, "whole": np.arange(5), "epoch": step}
            manager.save(step, args=WhaleSave(tree, step=step))
        manager.wait_until_finished()
        like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns)}
        restored = manager.restore(2, args=WhaleRestore(like))["w"]
    for shard in restored.addressable_shards:
        np.testing.assert_array_equal(shard.data, (host + 2)[shard.index])
    if int(rank) == 1:
        saving.write_extents = broken
    with ocp.CheckpointManager(Path(folder), options=options, item_handlers=handler) as manager:
        manager.save(3, args=WhaleSave(tree))
        try:
            manager.wait_until_finished()
        except OSError as error:
            print(f"{type(error).__name__}: {error}")


def broken(*_):
    """What a process does whose disk is broken."""
    raise OSError(5, "broken")


main(*sys.argv[1:])
