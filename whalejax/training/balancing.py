"""A run's part in balancing experts: plans beside the training, migrations at fixed steps."""

import functools
import math
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from whalejax.model.config import ModelConfig
from whalejax.model.sharding import path_name
from whalejax.parallel.eplb import BackgroundPlanner, count_moves, gpu_loads, plan_from
from whalejax.parallel.expert import Placement
from whalejax.parallel.mesh import EXPERT
from whalejax.training.experts import load_shape, moved, placed, unplaced
from whalejax.training.metrics import MetricsFile
from whalejax.training.step import StepConfig, TrainState, abstract_state


class Balancer:
    """Moves the experts of a run as `EPLBConfig` says; a context manager that ends its thread.

    Every `every` steps a plan is asked for, from the estimate after that step. `delay` steps later
    it is taken, whether it was ready long ago or has to be waited for, and each of the next steps
    is followed by a migration until the plan is reached. So all processes migrate at the same
    steps. Where nothing is balanced, states come back as they are.

    Attributes:
      plan: `int[layers, slots]`, the expert of each slot; uniform where nothing is balanced, None
        where experts are not shared out.
    """

    def __init__(self, model: ModelConfig, step: StepConfig, mesh: Mesh):
        self._model, self._step, self._mesh = model, step, mesh
        self._config, self._ranks = step.eplb, mesh.shape[EXPERT]
        self._planner: BackgroundPlanner | None = None
        self._future: Future | None = None
        self._planned_at, self._to_go = 0, []
        self.plan: np.ndarray | None = None
        if self._ranks > 1 and model.moe is not None:
            layers, experts = load_shape(model)
            self.plan = np.tile(np.arange(experts), (layers, 1))
        if step.eplb.every:
            self._planner = BackgroundPlanner(
                num_gpus=self._ranks, max_moves=step.eplb.max_moves, method=step.eplb.method
            )

    def __enter__(self) -> "Balancer":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._planner is not None:
            self._planner.close()

    def start(self, state: TrainState) -> TrainState:
        """Puts experts into slots, by a plan for the state's estimate of their loads."""
        if self._planner is None:
            return state
        slots = self._config.slots(self._model, self._mesh)
        estimate = np.asarray(state.load_estimate)
        self.plan = plan_from(estimate, slots, self._ranks, method=self._config.method)
        place = jax.jit(placed, out_shardings=self._shardings())
        return place(state, _host_placement(self.plan, self._ranks))

    def logical(self, state: TrainState) -> TrainState:
        """The state with every expert once, which shares the other arrays with the one given."""
        return state if state.placement is None else self._unplace(state)

    def after(self, step: int, state: TrainState, metrics: MetricsFile) -> TrainState:
        """Does what is due after a step: asks for a plan, or migrates; writes what moved."""
        if self._planner is None:
            return state
        if self._future is not None and step >= self._planned_at + self._config.delay:
            self._to_go, self._future = self._future.result(), None
        if self._to_go:
            return self._migrate(step, state, metrics)
        if self._future is None and step % self._config.every == 0:
            # a copy, because the next step takes the state's own buffer
            estimate = jnp.copy(state.load_estimate)
            self._future, self._planned_at = self._planner.request(estimate, self.plan), step
        return state

    def rank_load(self, load: np.ndarray, plan: np.ndarray | None) -> dict[str, np.ndarray]:
        """A metric: what ranks carry of each layer, `rank_load f64[layers, ranks]`, sum 1.

        Args:
          load: `f32[layers, E]`, of a step.
          plan: in use in that step.
        """
        if plan is None:
            return {}
        return {"rank_load": gpu_loads(load, plan, self._ranks)}

    def _migrate(self, step, state, metrics):
        plan = self._to_go.pop(0)
        state = self._move(state, _host_placement(plan, self._ranks))
        moves = int(count_moves(plan, self.plan).sum())
        moved = {"migrated_slots": moves, "migrated_bytes": moves * self._slot_bytes}
        metrics.write(step=step, planned_at=self._planned_at, **moved)
        self.plan = plan
        return state

    @functools.cached_property
    def _move(self):
        state = self._shardings()
        move = functools.partial(moved, mesh=self._mesh, max_moves=self._config.max_moves)
        return jax.jit(move, in_shardings=(state, None), out_shardings=state, donate_argnums=0)

    @functools.cached_property
    def _unplace(self):
        return jax.jit(unplaced, out_shardings=self._shardings(logical=True))

    @functools.cached_property
    def _slot_bytes(self):
        """Weights and moments of one expert in one layer."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self._abstract())
        leaves = [leaf for path, leaf in flat if ".experts." in path_name(path)]
        total = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
        return total // self.plan.size

    def _abstract(self, *, logical=False):
        return abstract_state(self._model, self._step, self._mesh, logical=logical)

    def _shardings(self, *, logical=False):
        return jax.tree.map(lambda leaf: leaf.sharding, self._abstract(logical=logical))


def _host_placement(plan, ranks):
    """Of NumPy arrays, which every process of a mesh may pass to a jitted function."""
    return jax.tree.map(np.asarray, Placement.from_eplb(plan, ranks))
