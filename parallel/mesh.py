"""Names of the mesh axes, in one place, and the meshes made of them."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

STAGE, DATA, FSDP, EXPERT = "stage", "data", "fsdp", "expert"
# slowest first: stages send least, so they may lie farthest apart
AXES = (STAGE, DATA, FSDP, EXPERT)
BATCH_AXES = (DATA, FSDP, EXPERT)  # the axes over which a batch is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis.

    Attributes:
      stage: ranks of a pipeline, each with a part of the layers.
      data: replicas of the parameters.
      fsdp: shards of the parameters and of the optimiser's state; -1 for all devices left.
      expert: ranks that share the experts out; for all else they are replicas with batches of
        their own.
    """

    stage: int = 1
    data: int = 1
    fsdp: int = -1
    expert: int = 1

    def __post_init__(self):
        if min(self.stage, self.data, self.expert) < 1 or (self.fsdp < 1 and self.fsdp != -1):
            raise ValueError(
                f"stage={self.stage}, data={self.data} and expert={self.expert} must be positive "
                f"and fsdp={self.fsdp} positive or -1"
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
    others = config.stage * config.data * config.expert
    fsdp = config.fsdp if config.fsdp != -1 else max(len(devices) // others, 1)
    sizes = (config.stage, config.data, fsdp, config.expert)
    if math.prod(sizes) != len(devices):
        shown = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"{shown} is {math.prod(sizes)} devices, but there are {len(devices)}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def batch_devices(mesh: Mesh) -> int:
    """Devices that share a batch; those of other stages work on the same sequences."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
