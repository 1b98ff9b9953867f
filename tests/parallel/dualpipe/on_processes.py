"""Pipelines of four stages over all processes, with a data axis of two.

`python on_processes.py PROCESS PROCESSES PORT FILE` in every process, 8 devices in all; the first
one writes losses and gradients of some schedules into FILE, an .npz.
"""

import sys

import jax
import numpy as np
import test_axes as cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.parallel.dualpipe import Sharding, value_and_grad

RANKS, MICROBATCHES = 4, 8
SCHEDULES = ("gpipe", "zb1p", "dualpipe")


def run(name, mesh):
    """Loss, reports and gradients, as arrays of this process."""
    step = value_and_grad(
        cases.dense,
        cases.close,
        mesh=mesh,
        num_microbatches=MICROBATCHES,
        schedule=name,
        first_fn=cases.enter,
        has_aux=True,
        defer=lambda path, leaf: leaf.ndim == 3,
        sharding=Sharding(batch_axes=("data",)),
    )
    whole = NamedSharding(mesh, PartitionSpec())
    host = jax.tree.map(np.asarray, cases.draw(cases.DENSE, RANKS, MICROBATCHES))
    results = jax.jit(step, out_shardings=whole)(*jax.device_put(host, whole))
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), results)


def main(process, processes, port, file):
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    mesh = jax.make_mesh((RANKS, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    of_stage = [{d.process_index for d in devices} for devices in mesh.devices]
    assert len(set.union(*of_stage)) == processes
    found = {}
    for name in SCHEDULES:
        paths, _ = jax.tree_util.tree_flatten_with_path(run(name, mesh))
        found |= {name + jax.tree_util.keystr(path): leaf for path, leaf in paths}
    if process == 0:
        np.savez(file, **found)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
