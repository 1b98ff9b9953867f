"""Names of the mesh axes, in one place, and the meshes made of them."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

DATA, FSDP = "data", "fsdp"
BATCH_AXES = (DATA, FSDP)  # the axes over which a batch is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis.

    Attributes:
      data: replicas of the parameters.
      fsdp: shards of the parameters and of the optimiser's state; -1 for all devices left.
    """

    data: int = 1
    fsdp: int = -1

    def __post_init__(self):
        if self.data < 1 or (self.fsdp < 1 and self.fsdp != -1):
            raise ValueError(
                f"data={self.data} must be positive and fsdp={self.fsdp} positive or -1"
            )


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over `devices`, all of this job's unless given.

    Axes are `Auto`: XLA's partitioner places what the sharding rules leave open.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp if config.fsdp != -1 else max(len(devices) // config.data, 1)
    sizes = (config.data, fsdp)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"data={config.data} x fsdp={fsdp} is {math.prod(sizes)} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh(
        sizes, BATCH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )
