"""Dispatch and combine on several devices, against one device of a CPU.

`python on_ranks.py`: all devices of one process, an even number; of GPUs with
`JAX_PLATFORMS=cuda,cpu`.

`python on_ranks.py RANK RANKS PORT` for every rank, in processes of their own: over gloo on CPUs,
or over NCCL, for which one GPU is enough (`NCCL_HOSTID` another for each rank,
`NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1`, `JAX_PLATFORMS=cuda,cpu`,
`XLA_PYTHON_CLIENT_PREALLOCATE=false`,
`XLA_FLAGS=--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true`); without `"peer"`, which
reaches the GPUs of one process.

Rank 0 prints a JSON line a case.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import test_dispatching as cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.kernels.quantization import quantize


def mesh_of(axis, ranks):
    names = (axis,) if isinstance(axis, str) else axis
    shape = (ranks,) if len(names) == 1 else (2, ranks // 2)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def on_cpu(f, *arguments):
    """What f gives on a CPU of this process."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.tree.map(np.asarray, f(*arguments))


@functools.cache
def step_of(way, wire, ranks):
    """Gradients, and the output with its overflow, compiled once for all that tokens choose."""
    mesh = mesh_of(cases.WAYS[way]["axis"], ranks)
    placement = on_cpu(cases.placement_of, "replicated", ranks)
    options = {"placement": placement, "way": cases.WAYS[way], "quantize": wire}
    moe = functools.partial(cases.moe, **options)
    f = cases.over_ranks(moe, cases.WAYS[way], ranks, mesh=mesh)

    def loss(x, weights, w, idx, target):
        out, overflow = f(x, idx, weights, w)
        return jnp.sum(out * target), (out, overflow)

    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(step, out_shardings=whole), whole


def compare(way, wire, kind, ranks):
    """Largest errors of the output and of the gradients."""
    x, idx, weights, w, target = host = on_cpu(cases.draw, kind, ranks)
    if wire == "fp8":
        x = host[0] = on_cpu(lambda: quantize(jnp.asarray(x)).dequantize())
    step, whole = step_of(way, wire, ranks)
    results = step(*(jax.device_put(a, whole) for a in (x, weights, w, idx, target)))
    grads, (out, overflow) = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), results)
    assert not overflow.any()
    wanted = on_cpu(lambda: cases.gradients(cases.one_device, list(map(jnp.asarray, host))))
    gradient_error = max(np.abs(a - b).max() for a, b in zip(grads, wanted, strict=True))
    return np.abs(out - cases.dense(x, idx, weights, w)).max(), gradient_error


def report(ranks, rank=0):
    """Runs every case on all devices of the job, those after a wrong one too."""
    jax.config.update("jax_default_matmul_precision", "highest")
    cases.H = 128  # what the kernels that reach peers take, too
    device, wrong = jax.devices()[0].device_kind, []
    alone = jax.process_count() == 1 or jax.default_backend() == "cpu"
    ways = [way for way in cases.WAYS if alone or way != "peer"]
    kinds = [(None, "all chosen"), (None, "some unselected"), (None, "all to one")]
    for way in ways:
        for wire, kind in (*kinds, ("fp8", "some unselected")):
            error, gradient_error = compare(way, wire, kind, ranks)
            row = {"ranks": ranks, "method": way, "wire": wire or "float32", "choices": kind}
            row |= {"error": float(error), "gradient_error": float(gradient_error)}
            if rank == 0:
                print(json.dumps(row | {"device": device, "jax": jax.__version__}), flush=True)
            wrong += [] if error < 1e-5 and gradient_error < 1e-4 else [row]
    assert not wrong, wrong


def main(*numbers):
    if not numbers:
        return report(jax.device_count())
    rank, ranks, port = numbers
    jax.distributed.initialize(f"127.0.0.1:{port}", ranks, rank)
    report(ranks, rank)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
