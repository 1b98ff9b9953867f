"""Names of the mesh axes, in one place, and the meshes made of them."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

DATA, FSDP, EXPERT = "data", "fsdp", "expert"
BATCH_AXES = (DATA, FSDP, EXPERT)  # the axes over which a batch is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis.

    Attributes:
      data: replicas of the parameters.
      fsdp: shards of the parameters and of the optimiser's state; -1 for all devices left.
      expert: ranks that share the experts out; for all else they are replicas with batches of
        their own.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1

    def __post_init__(self):
        if min(self.data, self.expert) < 1 or (self.fsdp < 1 and self.fsdp != -1):
            raise ValueError(
                f"data={self.data} and expert={self.expert} must be positive and fsdp={self.fsdp} "
                f"positive or -1"
            )

    def __str__(self):
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """The mesh of `data=2,expert=4`; axes that are not named keep their defaults.

        Raises:
          ValueError: an axis is unknown or its size no number; prints them.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        sizes = {}
        for part in filter(None, text.split(",")):
            name, _, size = part.partition("=")
            if name not in names or not size.removeprefix("-").isdigit():
                raise ValueError(f"mesh {text!r}: {part!r} must be one of {names}, =, and a number")
            sizes[name] = int(size)
        return cls(**sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over `devices`, all of this job's unless given.

    Axes are `Auto`: XLA's partitioner places what the sharding rules leave open.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.data * config.expert
    fsdp = config.fsdp if config.fsdp != -1 else max(len(devices) // others, 1)
    sizes = (config.data, fsdp, config.expert)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"data={config.data} x fsdp={fsdp} x expert={config.expert} is {math.prod(sizes)} "
            f"devices, but there are {len(devices)}"
        )
    return jax.make_mesh(
        sizes, BATCH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )
