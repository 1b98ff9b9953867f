"""Moving and summing over eight CPU devices, against indexing on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from whalejax.parallel.eplb import (
    count_moves,
    migrate,
    reachable,
    sum_replicas,
    to_logical,
    to_physical,
)
from whalejax.parallel.expert import Placement

LAYERS, EXPERTS, SLOTS, RANKS = 3, 6, 8, 4
SPECS = {
    "weights": PartitionSpec(None, "expert", "fsdp", None),
    "moment": PartitionSpec(None, "expert", "fsdp"),
    "bytes": PartitionSpec(None, "expert"),
    "bf16": PartitionSpec(None, "expert", None, "fsdp"),
    "fp8": PartitionSpec(None, "expert"),
}
COLLECTIVES = r"= \S+ (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


def mesh_of(data=1, fsdp=2, expert=RANKS):
    shape = {"data": data, "fsdp": fsdp, "expert": expert}
    devices = jax.devices()[: data * fsdp * expert]
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes, devices=devices)


def plan(seed, experts=EXPERTS, slots=SLOTS):
    rng = np.random.default_rng(seed)
    spare = slots - experts
    rows = [np.append(np.arange(experts), rng.integers(0, experts, spare)) for _ in range(LAYERS)]
    return np.array([rng.permutation(row) for row in rows])


def placed(slots):
    return Placement.from_eplb(slots, RANKS)


def any_bits(seed, rows=EXPERTS):
    """Random bytes as several dtypes: NaNs with payloads, -0.0, subnormal numbers."""
    rng = np.random.default_rng(seed)
    shapes = {
        "weights": ((4, 6), np.float32), "moment": ((2,), np.int32), "bytes": ((3,), np.uint8),
        "bf16": ((3, 2), jnp.bfloat16), "fp8": ((5,), jnp.float8_e4m3fn),
    }  # fmt: skip
    tree = {}
    for name, (shape, dtype) in shapes.items():
        size = np.dtype(dtype).itemsize
        raw = rng.integers(0, 256, (LAYERS, rows, *shape[:-1], shape[-1] * size), np.uint8)
        tree[name] = raw.view(dtype)
    tree["weights"][0, :, 0, 0] = -0.0
    return tree


def cut(tree, mesh):
    return {n: jax.device_put(a, NamedSharding(mesh, SPECS[n])) for n, a in tree.items()}


def assert_same_bits(got, wanted):
    for name, a in wanted.items():
        np.testing.assert_array_equal(
            np.asarray(got[name]).view(np.uint8), np.asarray(a).view(np.uint8), err_msg=name
        )


def rows_of(tree, slots):
    """Each slot's expert's rows."""
    return {n: np.stack([a[i][slots[i]] for i in range(LAYERS)]) for n, a in tree.items()}


def moving(mesh, max_moves):
    return jax.jit(
        functools.partial(migrate, mesh=mesh, axis="expert", max_moves=max_moves, specs=SPECS),
        out_shardings={n: NamedSharding(mesh, spec) for n, spec in SPECS.items()},
    )


@pytest.mark.parametrize("data", [1, 2], ids="data={}".format)
def test_migration_keeps_every_bit_of_any_dtype(data):
    mesh = mesh_of(data, fsdp=2 // data)
    move, logical = moving(mesh, SLOTS), any_bits(0)
    for seed in range(4):
        old, new = plan(seed), plan(seed + 10)
        got = move(cut(rows_of(logical, old), mesh), placed(old), placed(new))
        assert count_moves(old, new).max() > 4
        assert_same_bits(got, rows_of(logical, new))
        assert got["weights"].sharding.spec == SPECS["weights"]


def test_few_moves_need_a_small_buffer_and_many_change_nothing():
    mesh, logical, old = mesh_of(), any_bits(1), plan(0)
    new = old.copy()
    new[0, :2] = new[0, 1::-1]
    new[2] = plan(1)[2]
    assert count_moves(old, new).tolist()[:2] == [2, 0] and count_moves(old, new)[2] > 2
    got = moving(mesh, 2)(cut(rows_of(logical, old), mesh), placed(old), placed(new))
    after = np.asarray(reachable(placed(old), placed(new), 2).physical_to_logical)
    np.testing.assert_array_equal(after, [new[0], old[1], old[2]])
    assert_same_bits(got, rows_of(logical, after))


def test_another_placement_compiles_nothing_and_moves_all_in_one_collective():
    mesh = mesh_of()
    move, tree = moving(mesh, 3), cut(rows_of(any_bits(2), plan(0)), mesh)
    text = move.lower(tree, placed(plan(0)), placed(plan(1))).compile().as_text()
    assert len(re.findall(COLLECTIVES, text)) == 1
    for seed in (1, 2):
        move(tree, placed(plan(0)), placed(plan(seed)))
    assert move._cache_size() == 1


def test_donated_arrays_change_in_place():
    mesh = mesh_of()
    sharding = NamedSharding(mesh, PartitionSpec(None, "expert"))
    tree = {"a": jax.device_put(np.zeros((LAYERS, SLOTS, 64, 64), np.float32), sharding)}
    move = functools.partial(migrate, mesh=mesh, axis="expert", max_moves=1)
    move = jax.jit(move, donate_argnums=0, out_shardings={"a": sharding})
    memory = move.lower(tree, placed(plan(0)), placed(plan(1))).compile().memory_analysis()
    row = 64 * 64 * 4
    # a device has six rows; the row that moves stands for a moment in few copies
    assert memory.alias_size_in_bytes == 6 * row and memory.temp_size_in_bytes < 5 * row


def test_out_of_the_slots_is_the_inverse_of_into_them():
    mesh, logical, slots = mesh_of(), any_bits(3), plan(5)
    sharded = {n: NamedSharding(mesh, spec) for n, spec in SPECS.items()}
    expand = jax.jit(to_physical, out_shardings=sharded)
    physical = expand(logical, placed(slots))
    assert_same_bits(physical, rows_of(logical, slots))
    assert_same_bits(jax.jit(to_logical)(physical, placed(slots)), logical)


def gradients(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "weights": rng.normal(size=(LAYERS, SLOTS, 4, 6)).astype(dtype),
        "moment": rng.normal(size=(LAYERS, SLOTS, 2)).astype(dtype),
    }


@pytest.mark.parametrize("data", [1, 2], ids="data={}".format)
def test_replicas_get_the_sum_of_their_gradients_and_the_same_bits(data):
    mesh = mesh_of(data, fsdp=2 // data)
    slots, grads = plan(7), gradients(0)
    slots[0] = [0, 0, 0, 1, 2, 3, 4, 5]  # two of them on one rank, and a third
    specs = {n: SPECS[n] for n in grads}
    add = jax.jit(functools.partial(sum_replicas, mesh=mesh, axis="expert", specs=specs))
    got = add(cut(grads, mesh), placed(slots))
    for name, a in grads.items():
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                at = np.flatnonzero(slots[layer] == expert)
                mine = np.asarray(got[name])[layer, at]
                # three terms of size 1 to 3, in any order
                np.testing.assert_allclose(mine[0], a[layer, at].sum(0), atol=1e-6)
                np.testing.assert_array_equal(mine, np.broadcast_to(mine[0], mine.shape))
    text = add.lower(cut(grads, mesh), placed(slots)).compile().as_text()
    assert len(re.findall(COLLECTIVES, text)) == 1


def test_half_precision_is_summed_in_float32():
    mesh, slots = mesh_of(), np.tile([0, 0, 0, 1, 2, 3, 4, 5], (LAYERS, 1))
    terms = np.array([256, 1, 1, 9, 9, 9, 9, 9]).reshape(1, 8, 1)
    grads = {"moment": np.broadcast_to(terms, (LAYERS, 8, 2)).astype(jnp.bfloat16)}
    add = functools.partial(sum_replicas, mesh=mesh, axis="expert")
    got = np.asarray(add(grads, placed(slots))["moment"], np.float32)
    np.testing.assert_array_equal(got[0, :, 0], [258, 258, 258, 9, 9, 9, 9, 9])


def test_without_replicas_gradients_stay_what_they_are():
    grads = {"weights": jnp.zeros((LAYERS, 4, 3))}
    placement = placed(plan(0, 4, 4))
    assert sum_replicas(grads, placement, mesh=mesh_of(), axis="expert") is grads


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"axis": "data"}, "num_ranks=4 must be the size of axis 'data'"),
        ({"axis": "node"}, "num_ranks=4 must be the size of axis 'node'"),
        ({"tree": {"a": np.zeros((LAYERS, 9))}}, r"\(3, 8\), cut over 'expert'.*: \(3, 9\)"),
        ({"specs": {"a": PartitionSpec("expert")}}, r"\(3, 8\) as \w+\('expert',?\)"),
    ],
)
def test_what_does_not_fit_is_printed(change, says):
    tree = change.pop("tree", {"a": np.zeros((LAYERS, SLOTS))})
    options = {"mesh": mesh_of(), "axis": "expert"} | change
    with pytest.raises(ValueError, match=says):
        migrate(tree, placed(plan(0)), placed(plan(1)), max_moves=2, **options)
    with pytest.raises(ValueError, match=says):
        sum_replicas(tree, placed(plan(0)), **options)
