"""What a pipeline schedule is: for every rank, operations in the order in which it runs them."""

import dataclasses
import functools
from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"  # whole: input and weight gradient
INPUT = "I"  # input gradient alone
WEIGHT = "W"  # the weight gradient that an I deferred


class Op(NamedTuple):
    """What a rank does to one microbatch with one of its chunks.

    Attributes:
      kind: `FORWARD`, `BACKWARD`, `INPUT` or `WEIGHT`.
      chunk: of the rank's own chunks, from 0.
      microbatch: from 0.
    """

    kind: str
    chunk: int
    microbatch: int

    def __str__(self):
        return f"{self.kind}(chunk {self.chunk}, microbatch {self.microbatch})"


# what a rank does in one go: one operation, or a forward and a whole backward that run overlapped
Step = tuple[Op, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A pipeline schedule. `check` says whether it can run and keeps its promises.

    An activation lives on a rank from its forward to its backward or input gradient; from there to
    its weight gradient it counts as a deferred weight gradient.

    Attributes:
      name: for messages and tables.
      routes: ways through the pipeline: of each, the (rank, chunk) of every stage, first stage
        first. DualPipe has two, which meet each other; the others have one.
      route_of: of each microbatch, an index into `routes`.
      steps: of each rank, in order.
      activations: promised; the most live activations of a rank.
      deferred: promised; the most deferred weight gradients of a rank.
    """

    name: str
    routes: tuple[tuple[tuple[int, int], ...], ...]
    route_of: tuple[int, ...]
    steps: tuple[tuple[Step, ...], ...]
    activations: int
    deferred: int

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.steps)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step of training, over all routes."""
        return len(self.route_of)

    @property
    def num_stages(self) -> int:
        """Stages that a microbatch passes."""
        return len(self.routes[0])

    @property
    def chunks_per_rank(self) -> int:
        """Parts of the model that a rank holds."""
        return 1 + max(chunk for route in self.routes for _, chunk in route)

    @functools.cached_property
    def _stages(self):
        return tuple({place: s for s, place in enumerate(route)} for route in self.routes)

    def stage_of(self, rank: int, chunk: int, route: int) -> int:
        """The stage, from 0, that a rank's chunk is to the microbatches of a route.

        Raises:
          ValueError: the route does not pass there; prints all three.
        """
        try:
            return self._stages[route][rank, chunk]
        except (KeyError, IndexError):
            raise ValueError(
                f"{self.name}: chunk {chunk} of rank {rank} is no stage of route {route}"
            ) from None
