"""Experts that move between devices by plans, against NumPy's indexing, to the bit.

`python on_ranks.py`: all devices of one process; with GPUs, `JAX_PLATFORMS=cuda,cpu`.

`python on_ranks.py RANK RANKS PORT` for every rank, in processes of their own; see
tests/parallel/expert for the settings of GPUs.

Experts with Adam's moments, and random bits of several dtypes beside them, go from plan to plan.
Between two moves replicas get different gradients, whose sum is applied. Every rank compares what
its own devices hold; rank 0 prints a JSON line a plan.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.parallel.eplb import count_moves, migrate, rebalance_experts, sum_replicas
from whalejax.parallel.expert import Placement

LAYERS, SLOTS_PER_RANK, SPARE, HIDDEN, WIDTH = 3, 6, 5, 256, 96
DTYPES = {"f32": np.float32, "i32": np.int32, "bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}
OPTIMIZER = optax.adam(1e-2)


def plans(experts, slots, ranks):
    """Plans by their names: random ones, of which the last moves little, and EPLB's for a load."""
    rng = np.random.default_rng(0)
    rows = [np.append(np.arange(experts), rng.integers(0, experts, SPARE)) for _ in range(LAYERS)]
    found = {f"random {i}": np.array([rng.permutation(row) for row in rows]) for i in range(4)}
    load = rng.pareto(1.0, (LAYERS, experts))
    found["eplb"] = rebalance_experts(load, slots, 1, 1, ranks).physical_to_logical
    swapped = found["eplb"].copy()
    swapped[:, [0, -1]] = swapped[:, [-1, 0]]  # of the first rank and the last
    return found | {"two slots": swapped}


def fresh(plan, experts):
    """What slots hold at first: experts, moments, and random bits that are NaNs, -0.0 and all."""
    rng = np.random.default_rng(1)
    shapes = {"up": (LAYERS, experts, WIDTH, HIDDEN), "down": (LAYERS, experts, HIDDEN, WIDTH)}
    bits = {
        name: rng.integers(0, 256, (LAYERS, experts, 40), np.uint8).view(dtype)
        for name, dtype in DTYPES.items()
    }
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moments = {
        name: {leaf: rng.random(shape, np.float32) for leaf, shape in shapes.items()}
        for name in ("mu", "nu")
    }
    logical = {"params": params, "bits": bits} | moments
    return jax.tree.map(lambda a: gathered(a, plan), logical)


def gathered(rows, index):
    """Rows `index[layer]` of every layer."""
    return np.stack([of_layer[i] for of_layer, i in zip(rows, index, strict=True)])


def sources(old, new):
    """The slot that has what each slot of a new plan shall get, any of them: replicas are equal."""
    return np.array([[list(a).index(e) for e in b] for a, b in zip(old, new, strict=True)])


def cut(tree, mesh):
    """Arrays of a host over the ranks' slots; each process gives what its devices hold."""
    cut_slots = NamedSharding(mesh, PartitionSpec(None, "expert"))
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, cut_slots, lambda index: a[index]), tree
    )


def differing(tree, wanted):
    """Bytes of this process's devices that are not what is wanted."""
    return sum(
        int((bits(shard.data) != bits(b[shard.index])).sum())
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
        for shard in a.addressable_shards
    )


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def on_host(tree, mesh):
    """Every slot of every rank, as NumPy arrays."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    copied = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), copied)


def update(state, grads, placement, *, mesh):
    """One step of Adam, after which replicas are equal though their gradients were not."""
    grads = sum_replicas(grads, placement, mesh=mesh, axis="expert")
    moments = optax.ScaleByAdamState(jnp.int32(7), state["mu"], state["nu"])
    updates, (after, _) = OPTIMIZER.update(grads, (moments, optax.EmptyState()), state["params"])
    params = optax.apply_updates(state["params"], updates)
    return state | {"params": params, "mu": after.mu, "nu": after.nu}


def unequal_replicas(state, plan):
    """Bytes in which slots of one expert differ."""
    first = sources(plan, plan)
    return sum(int((bits(a) != bits(gathered(a, first))).sum()) for a in jax.tree.leaves(state))


def row_of(name, old, new, ranks, state):
    """What a move is: slots that change, and those that no slot of their rank can fill."""
    of_rank = [plan.reshape(LAYERS, ranks, -1) for plan in (old, new)]
    arrived = sum(
        len(set(after) - set(before))
        for layer in zip(*of_rank, strict=True)
        for before, after in zip(*layer, strict=True)
    )
    slot = sum(a[0, 0].nbytes for a in jax.tree.leaves(state))
    sizes = {"ranks": ranks, "slots": new.shape[1], "slot_bytes": slot, "plan": name}
    changed = int(count_moves(old, new).sum())
    return sizes | {"changed_slots": changed, "experts_from_other_ranks": arrived}


def report(ranks, rank=0):
    """Moves experts through all plans, those after a wrong one too."""
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,))
    slots = ranks * SLOTS_PER_RANK
    experts, wrong = slots - SPARE, []
    (_, old), *later = plans(experts, slots, ranks).items()
    host, rng = fresh(old, experts), np.random.default_rng(2)
    state = cut(host, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    options = {"donate_argnums": 0, "out_shardings": shardings}
    move = functools.partial(migrate, mesh=mesh, axis="expert", max_moves=slots)
    move, step = (jax.jit(f, **options) for f in (move, functools.partial(update, mesh=mesh)))
    for name, new in later:
        row = row_of(name, old, new, ranks, host)
        placements = [jax.tree.map(np.asarray, Placement.from_eplb(p, ranks)) for p in (old, new)]
        state, index = move(state, *placements), sources(old, new)
        host = jax.tree.map(lambda a, index=index: gathered(a, index), host)
        row["wrong_bytes"] = differing(state, host)
        drawn = {n: rng.normal(size=a.shape).astype(a.dtype) for n, a in host["params"].items()}
        state = step(state, cut(drawn, mesh), placements[1])
        # random bits stay NumPy's own: no step changes them, and a CPU's gather quiets bf16 NaNs
        host |= on_host({name: state[name] for name in ("params", "mu", "nu")}, mesh)
        row["unequal_bytes_of_replicas"] = unequal_replicas(host, new)
        old = new
        if rank == 0:
            print(json.dumps(row | device), flush=True)
        right = not row["wrong_bytes"] and not row["unequal_bytes_of_replicas"]
        wrong += [] if right and row["experts_from_other_ranks"] else [row]
    assert not wrong, wrong


def main(*numbers):
    if not numbers:
        return report(jax.device_count())
    rank, ranks, port = numbers
    jax.distributed.initialize(f"127.0.0.1:{port}", ranks, rank)
    report(ranks, rank)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
