"""The experts of a training state: in the slots of a placement, and each once again.

Weights of experts, their gradients and the optimiser's moments all end in the same paths, so that
one walk over a tree finds them. Layers are numbered as in a step's `load`: MoE layers, then MTP.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from whalejax.model.config import ModelConfig
from whalejax.model.sharding import partition_spec, path_name
from whalejax.parallel.eplb import migrate, reachable, sum_replicas, to_logical, to_physical
from whalejax.parallel.expert import Placement
from whalejax.parallel.mesh import EXPERT


@dataclasses.dataclass(frozen=True, kw_only=True)
class EPLBConfig:
    """Balancing experts over the ranks of the mesh axis `expert` (DeepSeek's EPLB).

    Attributes:
      every: steps between plans; 0 for experts that stay in their uniform places.
      redundant: slots beyond one for each expert, for replicas of hot ones.
      max_moves: slots of a layer that one step may change; larger changes take several steps.
      delay: steps after which a plan is in use, during which it is made beside the training.
      decay: what a step's loads still count after each later one, in the estimate.
      method: whale, or published.
    """

    every: int = 0
    redundant: int = 0
    max_moves: int = 8
    delay: int = 2
    decay: float = 0.95
    method: Literal["whale", "published"] = "whale"

    def __post_init__(self):
        wrong = [n for n in ("every", "redundant") if getattr(self, n) < 0]
        wrong += ["max_moves"] if self.max_moves < 2 else []
        wrong += ["delay"] if self.delay < 1 or (self.every and self.delay >= self.every) else []
        wrong += ["decay"] if not 0 <= self.decay < 1 else []
        if wrong:
            shown = ", ".join(f"{n}={getattr(self, n)}" for n in wrong)
            raise ValueError(
                f"eplb: {shown}: every and redundant must not be negative, max_moves at least 2, "
                f"delay from 1 to below every={self.every}, decay from 0 to below 1"
            )

    def slots(self, model: ModelConfig, mesh: Mesh) -> int:
        """Slots of a layer.

        Raises:
          ValueError: there is nothing to balance, or slots are no multiple of the ranks.
        """
        ranks = mesh.shape[EXPERT]
        if model.moe is None or ranks == 1:
            what = "the model has no experts" if model.moe is None else f"expert={ranks}"
            raise ValueError(
                f"eplb.every={self.every} needs experts and several ranks of the mesh axis "
                f"{EXPERT!r}, but {what}"
            )
        slots = model.moe.n_routed_experts + self.redundant
        if slots % ranks:
            raise ValueError(
                f"eplb.redundant={self.redundant} and n_routed_experts="
                f"{model.moe.n_routed_experts} are {slots} slots, must be a multiple of "
                f"{EXPERT}={ranks} of the mesh"
            )
        return slots


def load_shape(model: ModelConfig) -> tuple[int, int] | None:
    """Layers with experts, MTP included, and experts; None without any."""
    if model.moe is None:
        return None
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    return layers, model.moe.n_routed_experts


def some_placement(model: ModelConfig, config: EPLBConfig, mesh: Mesh) -> Placement:
    """A placement of the sizes of a run, in which the first experts have the replicas."""
    layers, experts = load_shape(model)
    slots = np.arange(config.slots(model, mesh)) % experts
    return Placement.from_eplb(np.tile(slots, (layers, 1)), mesh.shape[EXPERT])


def map_experts(f: Callable, tree: Any, placements: Any) -> Any:
    """Changes the leaves that belong to routed experts, all those of a kind of layer together.

    Args:
      f: from `{path: [layers, ...]}` and the placements of these layers to the same paths.
      tree: a state, parameters, or gradients.
      placements: a `Placement` of all layers, or a tuple of them.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {path_name(path): leaf for path, leaf in flat}
    first = 0
    for kind in ("moe_layers.", "mtp_layers."):
        of_kind = {p: leaf for p, leaf in leaves.items() if kind in p and ".experts." in p}
        if of_kind:
            last = first + next(iter(of_kind.values())).shape[0]
            part = slice(first, last)
            leaves |= f(of_kind, jax.tree.map(lambda a, part=part: a[part], placements))
            first = last
    return treedef.unflatten(leaves[path_name(path)] for path, _ in flat)


def placed(state: Any, placement: Placement) -> Any:
    """A state that has every expert once, in the slots of a placement."""
    return dataclasses.replace(map_experts(to_physical, state, placement), placement=placement)


def unplaced(state: Any) -> Any:
    """A state that has every expert once, as checkpoints and exports do."""
    without = dataclasses.replace(state, placement=None)
    return map_experts(to_logical, without, state.placement)


def moved(state: Any, new: Placement, mesh: Mesh, max_moves: int) -> Any:
    """A state in a new placement, as far as `max_moves` slots of a layer allow."""

    def move(leaves, placements):
        options = {"axis": EXPERT, "max_moves": max_moves, "specs": _specs(leaves, mesh)}
        return migrate(leaves, *placements, mesh=mesh, **options)

    new = reachable(state.placement, new, max_moves)
    return dataclasses.replace(map_experts(move, state, (state.placement, new)), placement=new)


def sum_of_replicas(grads: Any, placement: Placement, mesh: Mesh) -> Any:
    """Gradients in which every slot has that of its expert."""

    def add(leaves, placement):
        return sum_replicas(leaves, placement, mesh=mesh, axis=EXPERT, specs=_specs(leaves, mesh))

    return map_experts(add, grads, placement)


def global_norm(grads: Any, placement: Placement | None) -> jax.Array:
    """The norm of a gradient, `f32[]`, that counts an expert once however many slots it has."""

    def once(leaves, placement):
        counts = jnp.take_along_axis(placement.counts, placement.physical_to_logical, axis=1)
        counts = counts.reshape(*counts.shape, 1, 1)
        return {path: g * jax.lax.rsqrt(counts.astype(g.dtype)) for path, g in leaves.items()}

    return optax.tree.norm(grads if placement is None else map_experts(once, grads, placement))


def _specs(leaves, mesh):
    return {path: partition_spec(path, leaf.shape, mesh) for path, leaf in leaves.items()}
