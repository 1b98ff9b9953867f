"""How many experts, replicas, groups, nodes and GPUs a plan is for, and what follows from them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a plan. Where groups do not divide among nodes, it takes all GPUs for one node.

    Attributes:
      experts: logical experts of a layer.
      replicas: slots of a layer, over all GPUs.
      groups: groups of consecutive experts; the replicas of a group stay on one node.
      nodes: of consecutive GPUs.
      gpus: in all.

    Raises:
      ValueError: a size is not positive, or does not divide another that it has to; prints both.
    """

    experts: int
    replicas: int
    groups: int
    nodes: int
    gpus: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(f"num_{field.name}={size} must be positive")
        if self.replicas < self.experts:
            raise ValueError(
                f"num_replicas={self.replicas} is too few: each of {self.experts} experts needs one"
            )
        self._require_multiple("replicas", "gpus")
        self._require_multiple("gpus", "nodes")
        if self.groups % self.nodes == 0:
            self._require_multiple("experts", "groups")
        else:
            object.__setattr__(self, "groups", 1)
            object.__setattr__(self, "nodes", 1)
        if self.node_replicas < self.node_experts:
            raise ValueError(
                f"num_replicas={self.replicas} is too few: {self.nodes} nodes of "
                f"{self.node_experts} experts each have {self.node_replicas} slots"
            )

    def _require_multiple(self, whole, part):
        of, by = getattr(self, whole), getattr(self, part)
        if of % by:
            raise ValueError(f"num_{whole}={of} must be a multiple of num_{part}={by}")

    @property
    def slots(self) -> int:
        """Replicas that a GPU holds."""
        return self.replicas // self.gpus

    @property
    def node_experts(self) -> int:
        """Logical experts of a node."""
        return self.experts // self.nodes

    @property
    def node_replicas(self) -> int:
        """Slots of a node."""
        return self.replicas // self.nodes

    @property
    def node_gpus(self) -> int:
        """GPUs of a node, over which the replicas of its experts may spread."""
        return self.gpus // self.nodes

    @property
    def group_experts(self) -> int:
        """Consecutive experts in a group."""
        return self.experts // self.groups
