"""A pipeline of MoE layers on a mesh, as the benchmark of schedules builds it: all its programs."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whalejax.bench.schedules.ranks import (
    abstract_stages,
    draw_leaves,
    passes,
    transfers,
    with_prepared,
)
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder, Execution
from whalejax.model.parameters import RouterBias
from whalejax.model.sharding import batch_sharding, shardings
from whalejax.parallel.dualpipe import Schedule, make_schedule, overlap_pairs
from whalejax.parallel.mesh import STAGE, batch_devices
from whalejax.training.experts import global_norm
from whalejax.training.loss import LossConfig
from whalejax.training.pipeline import PipelineConfig, pipelined_gradient

OVERLAP, CHUNKS = "+overlap", 2  # of schedules' names, and of interleaved ones' ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(PipelineConfig):
    """A pipeline's settings by the name of its schedule, with "+overlap" for `overlap_pairs`."""

    def steps(self, mesh: Mesh) -> Schedule:
        """What each rank does."""
        name = self.schedule.removesuffix(OVERLAP)
        chunks = CHUNKS if name == "interleaved" else 1
        numbers = mesh.shape[STAGE], self.num_microbatches(mesh)
        steps = make_schedule(name, *numbers, chunks_per_rank=chunks)
        return overlap_pairs(steps) if self.schedule.endswith(OVERLAP) else steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed on one mesh in one precision.

    Attributes:
      model: whose layers are shared out over the ranks of the pipeline.
      execution: how to run; with the mesh.
      precision: its name.
      microbatches: of a step.
      length: tokens of a microbatch on a device.
    """

    model: ModelConfig
    execution: Execution
    precision: str
    microbatches: int
    length: int

    @property
    def mesh(self) -> Mesh:
        """Devices."""
        return self.execution.mesh

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what all devices have."""
        return NamedSharding(self.mesh, PartitionSpec())

    def __str__(self):
        axes = ",".join(f"{a}={n}" for a, n in self.mesh.shape.items() if n > 1 or a == STAGE)
        layers = self.model.num_hidden_layers // self.mesh.shape[STAGE]
        return f"{axes} {self.precision} M={self.microbatches} {layers} layers"

    def state(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh parameters and routers' biases."""
        dtype = self.execution.precision.master
        decoder = Decoder(self.model, rngs=nnx.Rngs(params=key), dtype=dtype)
        return nnx.split(decoder, nnx.Param, RouterBias)[1:]

    def abstract_state(self) -> tuple[Any, Any]:
        """The same without the arrays, with their shardings."""
        state = jax.eval_shape(self.state, jax.random.key(0))
        return jax.tree.map(
            lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            state,
            shardings(state, self.mesh),
        )

    def abstract_stages(self) -> Any:
        """The parameters and biases of the ranks of the pipeline."""
        return abstract_stages(self.abstract_state(), self.model, self.mesh)

    def abstract_tokens(self) -> jax.ShapeDtypeStruct:
        """A batch without its numbers."""
        shape = (self.microbatches * batch_devices(self.mesh), self.length + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.mesh))

    def step(self, schedule: str) -> Callable:
        """A function of parameters, biases and tokens.

        It gives the loss, the norm of the gradient, and how many choices of experts were left out.
        """
        pipeline = Named(schedule=schedule, microbatches=self.microbatches)

        def run(params, router_bias, tokens):
            options = self.model, LossConfig(), self.execution, pipeline, router_bias
            (loss, parts), gradient = pipelined_gradient(*options)(params, tokens)
            return loss, global_norm(gradient, None), parts.overflow

        return run


def programs_of(case: Case, schedules: Sequence[str]) -> Iterator[tuple[str, Callable, list]]:
    """The programs of a case: names, jitted functions of arrays to a list of arrays, and arguments.

    They are the steps, which take longest to compile, the last schedule first; the passes of
    `PARTS`; `transfer` between stages; and what draws the `state` of the steps, and the `leaves` of
    the passes, from a seed.
    """
    state, stages = case.abstract_state(), case.abstract_stages()
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=case.everywhere)
    for schedule in reversed(schedules):
        yield schedule, *flat(case.step(schedule), (*state, case.abstract_tokens()))
    places = [leaf.sharding for leaf in jax.tree.leaves(state)]
    yield "state", *flat(lambda seed: case.state(jax.random.key(seed)), (seed,), places)
    found = passes(stages, case.model, case.execution, case.length)
    _, prepare = with_prepared(stages, case.model, case.execution)

    def draw(seed):
        leaves = draw_leaves(stages, case.model.initializer_range, seed)
        return [*leaves, *prepare(leaves)]

    yield "leaves", *flat(draw, (seed,), [leaf.sharding for leaf in found["forward"][1][0]])
    for part, (f, arguments) in found.items():
        yield part, *flat(f, arguments)
    yield "transfer", *flat(transfers(case.mesh), (found["forward"][1][1].hidden,))


def flat(f: Callable, arguments: tuple, places: Any = None) -> tuple[Callable, list]:
    """A function without pytrees, jitted, and its arguments: so it can be written to a file."""
    leaves, structure = jax.tree.flatten(arguments)

    def on_leaves(*leaves):
        return jax.tree.leaves(f(*structure.unflatten(leaves)))

    return jax.jit(on_leaves, out_shardings=places), leaves
