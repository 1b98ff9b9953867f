"""Pipelines on several devices, against one device of a CPU.

`python on_ranks.py [STAGES]`: in one process, all its devices as STAGES (2) x ranks of experts, of
which 4 devices have two, so that branches which diverge hold their all-to-alls.

`python on_ranks.py RANK RANKS PORT` for every one of 4 ranks (stage=4) or 8 (stage=4, expert=2), in
processes of their own: over gloo on CPUs, or over NCCL, for which one GPU is enough.

See tests/parallel/expert for the settings of GPUs. Rank 0 prints a JSON line a schedule, and one
for 50 steps of gradient descent.
"""

import functools
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.kernels.grouped_gemm import grouped_matmul
from whalejax.parallel import dualpipe
from whalejax.parallel.expert import Placement, combine, dispatch
from whalejax.parallel.runtime import overlap_options

EXPERTS, HIDDEN, WIDTH, TOKENS, MICROBATCHES = 4, 64, 32, 32, 8
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


def pipeline(name, stages, ranks):
    mesh = jax.make_mesh((stages, ranks), ("stage", "expert"), axis_types=(AxisType.Auto,) * 2)
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


def arguments_of(name, stages):
    """Of a schedule whose ranks hold one stage of the model, or two."""
    return draw(stages * (2 if name in ("interleaved", "dualpipev") else 1))


def compile_all(stages, ranks):
    """Every schedule's step, lowered one by one and compiled side by side, as `name: future`."""
    lowered = {}
    for name in dualpipe.SCHEDULES:
        _, step = pipeline(name, stages, ranks)
        lowered[name] = jax.jit(step).lower(*arguments_of(name, stages))
    pool = ThreadPoolExecutor()
    compiling = {name: pool.submit(one.compile) for name, one in lowered.items()}
    pool.shutdown(wait=False)  # the first runs while others are still compiled
    return compiling


def exchanges_in_branches(step):
    """All-to-alls of a compiled step that some ranks run while others take another branch."""
    names = re.findall(r'= .* all-to-all(?:-start)?\(.*op_name="([^"]*)"', step.as_text())
    return sum("/branch_" in name for name in names)


def compare(name, step, mesh, stages):
    """Largest relative errors of loss and gradients."""
    arguments = arguments_of(name, stages)
    loss, gradients = whole(mesh, step(*arguments))
    wanted, of_one = on_one_device(arguments, len(arguments[0]["mix"]))
    errors = {
        key: float(np.linalg.norm(gradients[key] - of_one[key]) / np.linalg.norm(of_one[key]))
        for key in gradients
    }
    return abs(float(loss) / float(wanted) - 1), max(errors.values())


def descend(stages, ranks, steps=50):
    """Losses of some steps of gradient descent through DualPipe, compiled as training is."""
    mesh, step = pipeline("dualpipe", stages, ranks)

    def update(parameters, x, target):
        loss, gradients = step(parameters, x, target)
        return jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients), loss

    everywhere = NamedSharding(mesh, PartitionSpec())
    options = {"compiler_options": overlap_options(mesh), "donate_argnums": 0}
    update = jax.jit(update, out_shardings=everywhere, **options)
    parameters, x, target = jax.device_put(draw(stages), everywhere)
    losses = []
    for _ in range(steps):
        parameters, loss = update(parameters, x, target)
        losses.append(float(loss.addressable_data(0)))
    return losses


def report(stages, rank=0):
    """Runs every schedule on all devices of the job, those after a wrong one too."""
    jax.config.update("jax_default_matmul_precision", "highest")
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    ranks = jax.device_count() // stages
    mesh, _ = pipeline("dualpipe", stages, ranks)
    shape, wrong = {"mesh": f"stage={stages},expert={ranks}"}, []
    for name, compiling in compile_all(stages, ranks).items():
        began, step = time.perf_counter(), compiling.result()
        error, gradient_error = compare(name, step, mesh, stages)
        row = shape | {"schedule": name, "loss_error": error, "gradient_error": gradient_error}
        row |= {"exchanges_in_branches": exchanges_in_branches(step)}
        row |= {"seconds": time.perf_counter() - began}
        if rank == 0:
            print(json.dumps(row | device), flush=True)
        right = error < 1e-5 and gradient_error < 1e-4
        right = right and (ranks == 1 or row["exchanges_in_branches"])
        wrong += [] if right else [row]
    losses = descend(stages, ranks)
    if rank == 0:
        row = shape | {"steps": len(losses), "first": losses[0], "last": losses[-1]}
        print(json.dumps(row | device), flush=True)
    assert losses[-1] < losses[0] and not wrong, wrong


def main(*numbers):
    if len(numbers) < 2:
        return report(*numbers or (2,))
    rank, processes, port = numbers
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    report(4, rank)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
