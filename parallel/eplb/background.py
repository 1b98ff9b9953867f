"""Plans made in a thread of the host, while the devices go on."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from whalejax.parallel.eplb.estimate import read_estimate
from whalejax.parallel.eplb.moves import align
from whalejax.parallel.eplb.planning import rebalance_experts
from whalejax.parallel.eplb.sizes import Sizes
from whalejax.parallel.eplb.transition import walk


def plan_from(
    estimate: np.ndarray,
    num_replicas: int,
    num_gpus: int,
    *,
    method: str = "whale",
    current: np.ndarray | None = None,
) -> np.ndarray:
    """Plans for the expected load of GPUs that are alike, keeping of a plan in use what it can.

    Args:
      estimate: `f32[layers, E]` of `update_estimate`.
      num_replicas: slots of a layer.
      num_gpus: over which they are spread.
      method: `"whale"` or `"published"`.
      current: `int[layers, num_replicas]`, the plan in use, None without one.

    Returns:
      `i32[layers, num_replicas]`, the expert of each slot.

    Raises:
      ValueError: as `rebalance_experts`.
    """
    load = read_estimate(estimate)
    kept = current if method == "whale" else None
    sizes = (num_replicas, 1, 1, num_gpus)  # groups only matter where there are several nodes
    plan = rebalance_experts(load, *sizes, method=method, current=kept).physical_to_logical
    if current is None or kept is not None:
        return plan
    names = ("replicas", "groups", "nodes", "gpus")
    sizes = Sizes(experts=load.shape[1], **dict(zip(names, sizes, strict=True)))
    return align(plan, np.asarray(current), sizes)


class BackgroundPlanner:
    """Plans one request after another in a thread; a context manager that ends it.

    What it plans depends on what is asked alone: processes that ask alike get the same.

    Args:
      num_gpus: over which slots are spread.
      max_moves: slots of a layer that a step may change.
      method: of `rebalance_experts`.
    """

    def __init__(self, *, num_gpus: int, max_moves: int, method: str = "whale"):
        self._num_gpus, self._max_moves, self._method = num_gpus, max_moves, method
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eplb")

    def __enter__(self) -> "BackgroundPlanner":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after the plan under way."""
        self._thread.shutdown(cancel_futures=True)

    def request(self, estimate: jax.Array, current: np.ndarray) -> Future[list[np.ndarray]]:
        """Begins to plan; returns at once.

        Args:
          estimate: `f32[layers, E]`; the thread waits for it, so it must not be donated.
          current: `int[layers, replicas]`, the plan in use.

        Returns:
          The plans to go through one by one, as `walk` gives them; its `result()` waits.
        """
        return self._thread.submit(self._plan, estimate, current)

    def _plan(self, estimate, current):
        options = {"method": self._method, "current": current}
        target = plan_from(np.asarray(estimate), current.shape[1], self._num_gpus, **options)
        return walk(current, target, self._max_moves)
