"""The passes of a pipeline's stage on all devices of a mesh at once, each with its own stage.

Collectives over the experts' ranks are in them, as in a pipeline, but nothing travels between
stages; how long that takes is timed apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whalejax.bench.pipeline import PARTS, functions_of, parts_of
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Execution
from whalejax.model.pipelined import Travelling, divide, split
from whalejax.model.sharding import path_name, stage_spec
from whalejax.parallel.dualpipe.stage import trace_stage
from whalejax.parallel.mesh import AXES, STAGE

# of some passes' results the one that others take; they give it first
FOR_OTHERS = {"forward": 1, "input": 2}
TRANSFERS = 20  # in one program: one alone is as short as its launch


def abstract_stages(state: tuple[Any, Any], model: ModelConfig, mesh: Mesh) -> Any:
    """The stages' parameters and biases, `[stage ranks, ...]`, without their numbers.

    Args:
      state: abstract parameters and biases.
      model: whose layers are shared out over the ranks of `stage`.
      mesh: devices.
    """
    division = divide(model, mesh.shape[STAGE])

    def placed(path, leaf):
        spec = PartitionSpec(STAGE, *stage_spec(path_name(path), leaf.shape[1:], mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    stages = jax.eval_shape(lambda *state: split(*state, division)[0], *state)
    return jax.tree_util.tree_map_with_path(placed, stages)


def draw_leaves(stages: Any, std: float, seed: jax.Array) -> list[jax.Array]:
    """Leaves like those of abstract stages.

    Weights are random with a deviation `std`, norms and biases 1. Layers that are cut out of their
    stack would do as well, but a program that does no more takes XLA minutes.
    """
    leaves = jax.tree.leaves(stages)

    def numbers(key, leaf):
        if len(leaf.shape) <= 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.random.normal(key, leaf.shape, leaf.dtype) * std

    return list(map(numbers, jax.random.split(jax.random.key(seed), len(leaves)), leaves))


def with_prepared(stages: Any, model: ModelConfig, execution: Execution) -> tuple[Any, Callable]:
    """What is made of the stages' leaves before a step, as every device has it.

    Args:
      stages: abstract, what `abstract_stages` gives.
      model: sizes; its layers are shared out over the ranks of `stage`.
      execution: how to run, on its mesh.

    Returns:
      What a pipeline runs of them then, and a function from leaves to that, `[devices, ...]`.
    """
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stages)
    functions, leaves = functions_of(one, model, execution)
    ready = functions

    def made(leaves):
        nonlocal ready
        ready, (both,) = functions.prepared([leaves])
        return both[len(leaves) :]

    def on_rank(leaves):
        return [a[None] for a in made([a[0] for a in leaves])]

    jax.eval_shape(made, leaves)
    cuts = [leaf.sharding.spec for leaf in jax.tree.leaves(stages)]
    on_all = PartitionSpec(AXES)
    options = {"in_specs": (cuts,), "out_specs": on_all, "check_vma": False}
    return ready, jax.shard_map(on_rank, mesh=execution.mesh, **options)


def passes(
    stages: Any, model: ModelConfig, execution: Execution, length: int
) -> dict[str, tuple[Callable, tuple]]:
    """The passes by name, each as a function and its abstract arguments.

    Functions take the stages' leaves, followed by what is made of them before a step, and what
    `PARTS` says with a leading axis of all devices. A forward pass gives first what it keeps, and
    `input` what weight gradients wait for.

    Args:
      stages: abstract, what `abstract_stages` gives.
      model: sizes; its layers are shared out over the ranks of `stage`.
      execution: how to run, on its mesh.
      length: tokens of a microbatch on a device.
    """
    mesh = execution.mesh
    functions, prepare = with_prepared(stages, model, execution)
    hidden = jax.ShapeDtypeStruct((1, length, model.hidden_size), execution.precision.dtype)
    x = Travelling(hidden, jax.ShapeDtypeStruct((), jnp.float32))
    leaves = jax.tree.leaves(stages)
    cuts = [leaf.sharding.spec for leaf in leaves]
    on_all = PartitionSpec(AXES)

    def placed(tree):
        place = NamedSharding(mesh, on_all)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    prepared = placed(jax.eval_shape(prepare, leaves))
    cuts, leaves = [*cuts, *(on_all for _ in prepared)], [*leaves, *prepared]

    def call(part):
        def on_rank(leaves, *arguments):
            leaves, *arguments = jax.tree.map(lambda a: a[0], (leaves, *arguments))
            stage = trace_stage(functions, leaves, None, x, None)
            found = parts_of(stage)[part](leaves, *arguments)
            if part in FOR_OTHERS:
                index = FOR_OTHERS[part]
                found = found[index], found[:index], found[index + 1 :]
            return jax.tree.map(lambda a: jnp.asarray(a)[None], found)

        specs = (cuts, *(on_all for _ in PARTS[part]))
        options = {"mesh": mesh, "in_specs": specs, "out_specs": on_all, "check_vma": False}
        return jax.shard_map(on_rank, **options)

    def stacked(a):
        return jax.ShapeDtypeStruct((mesh.size, *a.shape), a.dtype)

    calls = {part: call(part) for part in PARTS}
    given = dict.fromkeys(("x", "dy"), placed(jax.tree.map(stacked, x)))
    given["kept"] = placed(jax.eval_shape(calls["forward"], leaves, given["x"])[0])
    given["slots"] = placed(jax.eval_shape(calls["input"], leaves, given["kept"], given["dy"])[0])
    return {
        part: (f, (leaves, *(given[name] for name in PARTS[part]))) for part, f in calls.items()
    }


def transfers(mesh: Mesh) -> Callable:
    """A function that sends `[devices, ...]` on by one stage, `TRANSFERS` times."""
    ranks = mesh.shape[STAGE]
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]

    def on_rank(x):
        return lax.fori_loop(0, TRANSFERS, lambda _, x: lax.ppermute(x, STAGE, ring), x)

    spec = PartitionSpec(AXES)
    return jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec)
