"""Pipelines on ranks that are processes of their own, against one device of a CPU.

`python on_ranks.py RANK RANKS PORT` for every one of 4 ranks (stage=4) or 8 (stage=4, expert=2):
over gloo on CPUs, or over NCCL, for which one GPU is enough (see tests/parallel/expert).
Rank 0 prints a JSON line a schedule, and one for 50 steps of gradient descent.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.kernels.grouped_gemm import grouped_matmul
from whalejax.parallel import dualpipe
from whalejax.parallel.expert import Placement, combine, dispatch

STAGES, EXPERTS, HIDDEN, WIDTH, TOKENS, MICROBATCHES = 4, 4, 64, 32, 32, 8
SPECS = {"up": PartitionSpec("expert"), "down": PartitionSpec("expert")}
ALL = {name: SPECS.get(name, PartitionSpec()) for name in ("mix", "router", "up", "down")}


def linear(x, w):
    return jnp.tanh(x) @ w


def grouped(rows, w):
    x, group_sizes = rows
    return grouped_matmul(x, w, group_sizes, alignment=8)


def stage(p, x, ranks):
    """A dense layer and a mixture of experts, which `ranks` ranks share out."""
    x = x + dualpipe.deferrable(linear, x, p["mix"])
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    placement = Placement.uniform(EXPERTS, ranks)
    sent = dispatch(x, chosen, weights, placement, axis="expert", alignment=8)
    up = dualpipe.deferrable(grouped, (sent.tokens, sent.group_sizes), p["up"])
    rows = jax.nn.silu(up), sent.group_sizes
    return x + combine(dualpipe.deferrable(grouped, rows, p["down"]), sent.handle)


def loss_fn(x, target):
    return jnp.mean((x - target) ** 2)


def draw(stages, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    parameters = {
        "mix": normal(stages, HIDDEN, HIDDEN) / 16,
        "router": normal(stages, HIDDEN, EXPERTS),
        "up": normal(stages, EXPERTS, WIDTH, HIDDEN) / 8,
        "down": normal(stages, EXPERTS, HIDDEN, WIDTH) / 8,
    }
    batch = MICROBATCHES * TOKENS
    return parameters, normal(batch, HIDDEN), normal(batch, HIDDEN)


def pipeline(name, ranks):
    mesh = jax.make_mesh((STAGES, ranks), ("stage", "expert"), axis_types=(AxisType.Auto,) * 2)
    sharding = dualpipe.Sharding(batch_axes=("expert",), stages=ALL)
    step = dualpipe.value_and_grad(
        functools.partial(stage, ranks=ranks),
        loss_fn,
        mesh=mesh,
        num_microbatches=MICROBATCHES,
        schedule=name,
        chunks_per_rank=2 if name == "interleaved" else 1,
        defer=lambda path, _: path[0].key != "router",
        sharding=sharding,
    )
    return mesh, step


def on_one_device(arguments, stages):
    """Loss and gradients without a pipeline, on a CPU of this process."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        one = jax.make_mesh((1,), ("expert",), devices=[jax.local_devices(backend="cpu")[0]])

        def loss(parameters, x, target):
            for i in range(stages):
                x = stage(jax.tree.map(lambda a, i=i: a[i], parameters), x, 1)
            return loss_fn(x, target)

        placed = jax.shard_map(
            loss, mesh=one, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        found = jax.jit(jax.value_and_grad(placed))(
            *map(jax.tree.map, [jnp.asarray] * 3, arguments)
        )
        return jax.tree.map(np.asarray, found)


def whole(mesh, tree):
    """Every array of a pytree on this host."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    copied = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), copied)


def compare(name, ranks):
    """Largest relative errors of loss and gradients."""
    stages = STAGES * (2 if name in ("interleaved", "dualpipev") else 1)
    arguments = draw(stages)
    mesh, step = pipeline(name, ranks)
    loss, gradients = whole(mesh, jax.jit(step)(*arguments))
    wanted, of_one = on_one_device(arguments, stages)
    errors = {
        key: float(np.linalg.norm(gradients[key] - of_one[key]) / np.linalg.norm(of_one[key]))
        for key in gradients
    }
    return abs(float(loss) / float(wanted) - 1), errors


def descend(ranks, steps=50):
    """Losses of some steps of gradient descent through DualPipe."""
    mesh, step = pipeline("dualpipe", ranks)

    def update(parameters, x, target):
        loss, gradients = step(parameters, x, target)
        return jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients), loss

    update = jax.jit(update, donate_argnums=0)
    parameters, x, target = draw(STAGES)
    losses = []
    for _ in range(steps):
        parameters, loss = update(parameters, x, target)
        losses.append(float(whole(mesh, loss)))
    return losses


def main(rank, processes, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    jax.config.update("jax_default_matmul_precision", "highest")
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    ranks = processes // STAGES
    for name in dualpipe.SCHEDULES:
        began = time.perf_counter()
        error, gradient_errors = compare(name, ranks)
        row = {"mesh": f"stage={STAGES},expert={ranks}", "schedule": name, "loss_error": error}
        row |= {"gradient_error": max(gradient_errors.values())}
        row |= {"seconds": time.perf_counter() - began}
        if rank == 0:
            print(json.dumps(row | device), flush=True)
        assert error < 1e-5 and row["gradient_error"] < 1e-4, row
    losses = descend(ranks)
    if rank == 0:
        row = {"steps": len(losses), "first": losses[0], "last": losses[-1]}
        print(json.dumps(row | device), flush=True)
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
