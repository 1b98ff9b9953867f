"""Where each replica of each expert lives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Slots of experts, `slots_per_rank` on each rank of one or more mesh axes, in their order.

    Shapes depend on the numbers of experts, slots and ranks alone, so that a jitted step takes any
    placement of the same numbers without being compiled again. Those of several layers are stacked
    on a leading axis, over which `jax.lax.scan` goes; dispatch takes one layer.

    Attributes:
      physical_to_logical: `i32[slots]`, the expert in each slot; rank r holds slots
        `r * slots_per_rank` to `(r + 1) * slots_per_rank`.
      logical_to_physical: `i32[E, slots - E + 1]`, the slots of each expert, then -1.
      counts: `i32[E]`, how many slots an expert has.
      num_ranks: ranks that the slots are spread over.
    """

    physical_to_logical: jax.Array
    logical_to_physical: jax.Array
    counts: jax.Array
    num_ranks: int = dataclasses.field(metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """Logical experts."""
        return self.counts.shape[-1]

    @property
    def slots_per_rank(self) -> int:
        """Experts, or replicas, that a rank holds."""
        return self.physical_to_logical.shape[-1] // self.num_ranks

    @classmethod
    def uniform(cls, num_experts: int, num_ranks: int) -> "Placement":
        """Every expert once, in order.

        Raises:
          ValueError: `num_experts` is no multiple of `num_ranks`; prints both.
        """
        return cls.from_eplb(np.arange(num_experts), num_ranks)

    @classmethod
    def from_eplb(cls, physical_to_logical: ArrayLike, num_ranks: int) -> "Placement":
        """The placement of a plan's layer, or of all its layers.

        Args:
          physical_to_logical: `i32[slots]` or `i32[layers, slots]`, concrete; experts are numbered
            from 0, each is there in every layer.
          num_ranks: that the slots are spread over.

        Raises:
          ValueError: slots are no multiple of ranks, or an expert is missing; prints which.
        """
        experts = np.asarray(physical_to_logical, np.int32)
        slots = experts.shape[-1] if experts.ndim else 0
        if experts.ndim not in (1, 2) or num_ranks < 1 or not experts.size or slots % num_ranks:
            raise ValueError(
                f"Placement: physical_to_logical of shape {experts.shape} must be [slots], a "
                f"multiple of num_ranks={num_ranks}, or [layers, slots]"
            )
        num_experts = int(experts.max()) + 1
        counts = (experts[..., None] == np.arange(num_experts, dtype=np.int32)).sum(-2)
        if experts.min() < 0 or not counts.all():
            missing = np.argwhere(counts == 0).squeeze(-1 if experts.ndim == 1 else ()).tolist()
            each = "expert" if experts.ndim == 1 else "[layer, expert]"
            raise ValueError(
                f"Placement: every expert of 0..{num_experts - 1} must have a slot; {each} without "
                f"one: {missing}, smallest number: {experts.min()}"
            )
        tables = _slots_of_experts(experts, counts), counts.astype(np.int32)
        return cls(jnp.asarray(experts), *map(jnp.asarray, tables), num_ranks)

    def slots_of(self, topk_idx: jax.Array, salt: jax.Array | int = 0) -> jax.Array:
        """The slot that serves each choice of each token, its expert's replicas in turn.

        Args:
          topk_idx: `i32[T, k]`, experts; -1 for no choice.
          salt: where turns begin, so that not all ranks begin with the same replica.

        Returns:
          `i32[T, k]`, -1 for no choice.
        """
        expert = jnp.maximum(topk_idx, 0)
        turn = jnp.arange(topk_idx.shape[0], dtype=jnp.int32)[:, None] + salt
        # arrays of a host's plan may be NumPy's
        slots, counts = jnp.asarray(self.logical_to_physical), jnp.asarray(self.counts)
        slot = slots[expert, turn % counts[expert]]
        return jnp.where(topk_idx < 0, -1, slot).astype(jnp.int32)


def _slots_of_experts(experts, counts):
    """The slots of each expert, then -1: `i32[..., E, slots - E + 1]`."""
    slots, num_experts = experts.shape[-1], counts.shape[-1]
    slot = np.argsort(experts, axis=-1, kind="stable")
    expert = np.take_along_axis(experts, slot, axis=-1)
    first = np.cumsum(counts, axis=-1) - counts
    number = np.arange(slots) - np.take_along_axis(first, expert, axis=-1)
    width = slots - num_experts + 1
    table = np.full((*experts.shape[:-1], num_experts * width), -1, np.int32)
    np.put_along_axis(table, expert * width + number, slot.astype(np.int32), axis=-1)
    return table.reshape(*experts.shape[:-1], num_experts, width)
