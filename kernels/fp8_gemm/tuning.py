"""Tile sizes of the FP8 matmul kernels: what fits, what a shape wants, what was measured."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from whalejax.kernels.mosaic import SMEM_BYTES, rounded

BLOCK_K = 128  # elements of K that share a scale: one slot of the ring
WARPGROUP_ROWS = 64  # rows of a wgmma
MAX_STAGES = 12
TABLE = Path(__file__).with_name("tuning_table.json")
USER_TABLE = Path.home() / ".cache" / "whalejax" / "fp8_gemm_tuning.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How one CTA works.

    Attributes:
      tile_m: rows of a tile: 64 for one math warpgroup, 128 for two, 256 for two in two waves.
      tile_n: columns of a tile.
      stages: slots of the ring through which K blocks pass.
      cluster: CTAs that share one operand by multicast.
      share: the operand that they share: `"w"` stacks their tiles along M, `"x"` along N.
      width: rows of clusters that are walked together.
      stagger: how much later the second warpgroup starts, in steps of 4 cycles.
    """

    tile_m: int = 128
    tile_n: int = 192
    stages: int = 4
    cluster: int = 1
    share: str = "w"
    width: int = 8
    stagger: int = 0

    def __post_init__(self):
        widest = 128 if self.tile_m == 256 else 256
        if self.tile_m not in (64, 128, 256) or self.tile_n % 8 or not 8 <= self.tile_n <= widest:
            raise ValueError(
                f"tile_m={self.tile_m} must be 64, 128 or 256, tile_n={self.tile_n} a multiple of "
                f"8 and at most {widest}"
            )
        if self.share not in ("w", "x") or self.stages < 2:
            raise ValueError(
                f"share={self.share!r} must be 'w' or 'x', stages={self.stages} at least 2"
            )

    @property
    def warpgroups(self) -> int:
        """Math warpgroups."""
        return min(2, self.tile_m // WARPGROUP_ROWS)

    @property
    def waves(self) -> int:
        """How often a warpgroup's 64 rows fit in its share of a tile."""
        return self.tile_m // (WARPGROUP_ROWS * self.warpgroups)

    @property
    def group(self) -> tuple[int, int]:
        """A cluster's tiles along M and N."""
        return (self.cluster, 1) if self.share == "w" else (1, self.cluster)

    def smem_bytes(self, out_itemsize: int) -> int:
        """SMEM of a CTA: the ring, the scales, the output on its way, barriers."""
        return (
            rounded(self.stages * self.tile_m * BLOCK_K)
            + rounded(self.stages * self.tile_n * BLOCK_K)
            + rounded(self.stages * self.tile_m * 4)
            + rounded(self.stages * 3 * BLOCK_K)  # of w: at most 3 blocks of 32 scales
            + rounded(self.tile_m * self.tile_n * out_itemsize)
            + rounded(2 * self.stages * 8)
        )

    def fits(self, out_itemsize: int) -> bool:
        """Whether a CTA has the SMEM."""
        return self.smem_bytes(out_itemsize) <= SMEM_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class WgradTuning:
    """How one CTA works on a weight gradient; see `Tuning`."""

    tile_m: int = 128
    tile_n: int = 128
    stages: int = 4
    width: int = 8

    def __post_init__(self):
        if self.tile_m != 128 or self.tile_n % 32 or not 32 <= self.tile_n <= 160:
            raise ValueError(
                f"tile_m={self.tile_m} must be 128, tile_n={self.tile_n} a multiple of 32 and at "
                f"most 160"
            )

    def smem_bytes(self) -> int:
        """SMEM of a CTA: the ring, the scales, the output on its way, barriers."""
        operands = self.tile_m + self.tile_n
        return (
            rounded(self.stages * operands * BLOCK_K)
            + rounded(self.stages * self.tile_m * 4)
            + rounded(self.stages * self.tile_n * 4)
            + rounded(self.tile_m * self.tile_n * 4)
            + rounded(2 * self.stages * 8)
        )


# The cost model, fitted to an H100 SXM: microseconds.
START_US = 3.0  # launch, first loads, last stores
BLOCK_US, BLOCK_US_PER_COLUMN = 0.12, 0.00234  # a K block of 128 rows, for two warpgroups
ODD_WIDTH = 1.1  # where tiles start inside of a panel or of a block of scales
STORE_US, STORE_US_PER_COLUMN = 0.2, 0.004  # what of an epilogue nothing hides
SM_BYTES_PER_US = 72_000  # that one SM takes in
HBM_BYTES_PER_US = 2.9e6
STAGGER = 70  # about half of a K block


def pick(
    m: int, n: int, k: int, *, out_itemsize: int, ctas: int, device: str | None = None
) -> Tuning:
    """The tuning for `[m, k]` times `[n, k]`: measured if there is one, else by the cost model.

    Args:
      m, n, k: sizes; of a grouped matmul those of all groups' rows together.
      out_itemsize: bytes of an output element.
      ctas: multiprocessors of the device.
      device: its kind, for the table of what was measured.
    """
    measured = table().get(device, {}).get(shape_key(m, n, k, out_itemsize))
    if measured is not None:
        return measured
    return min(candidates(m, n, out_itemsize), key=lambda t: cost_us(t, m, n, k, ctas))


def shape_key(m: int, n: int, k: int, out_itemsize: int) -> str:
    """A shape's name in a table."""
    return f"{m}x{n}x{k}x{out_itemsize}"


def candidates(m: int, n: int, out_itemsize: int) -> list[Tuning]:
    """What the cost model chooses from: every width, with as deep a ring as fits."""
    tile_m = 64 if m <= 64 else 128
    widths = [16] if n < 32 else [*range(32, 193, 16), 56]
    found = (deepest(out_itemsize, tile_m=tile_m, tile_n=tile_n) for tile_n in widths)
    return [t for t in found if t is not None]


def explored(m: int, n: int, out_itemsize: int) -> list[Tuning]:
    """What a tuning run looks at beside `candidates`: clusters, and tiles of other heights."""
    heights: dict[int, tuple[int, ...]] = {}
    if m <= 256:
        heights[64] = (32, 48, 56, 64, 96)
    if m > 64:
        heights[128] = (32, 64) if m <= 128 else (128, 192)
    if m > 128:
        heights[256] = (96, 128)
    known = candidates(m, n, out_itemsize)
    found = [
        deepest(out_itemsize, tile_m=tile_m, tile_n=tile_n, cluster=cluster, share=share)
        for tile_m, widths in heights.items()
        for tile_n in widths
        for cluster, share in ((1, "w"), (2, "w"), (2, "x"))
        if not (share == "w" and cluster > 1 and m <= tile_m)  # one row of tiles: nothing to share
    ]
    return [t for t in found if t is not None and t not in known]


def deepest(out_itemsize: int, **sizes: Any) -> Tuning | None:
    """The tuning of these sizes with the most stages that fit, if two do."""
    stagger = STAGGER if sizes["tile_m"] > 64 else 0
    tunings = (
        Tuning(stages=stages, stagger=stagger, **sizes) for stages in range(MAX_STAGES, 1, -1)
    )
    return next((t for t in tunings if t.fits(out_itemsize)), None)


def cost_us(t: Tuning, m: int, n: int, k: int, ctas: int) -> float:
    """What a matmul takes by the cost model: whole waves of tiles, or the memory's time."""
    tiles = -(-m // t.tile_m) * -(-n // t.tile_n)
    waves, blocks = -(-tiles // ctas), -(-k // BLOCK_K)
    compute = (BLOCK_US + BLOCK_US_PER_COLUMN * t.tile_n) * t.tile_m / 128
    compute *= 1 if t.tile_n % 64 == 0 else ODD_WIDTH
    loads = (t.tile_m + t.tile_n) * BLOCK_K / SM_BYTES_PER_US
    tile = blocks * max(compute, loads) + STORE_US + STORE_US_PER_COLUMN * t.tile_n
    memory = (m * k + n * k + 2 * m * n) / HBM_BYTES_PER_US
    return START_US + max(waves * tile, memory)


@functools.cache
def table() -> dict[str, dict[str, Tuning]]:
    """Measured tunings by device kind and shape: the package's, and over them the user's own."""
    merged: dict[str, dict[str, Tuning]] = {}
    for path in (TABLE, USER_TABLE):
        for device, rows in read_table(path).items():
            merged.setdefault(device, {}).update(rows)
    return merged


def read_table(path: Path) -> dict[str, dict[str, Tuning]]:
    """The tunings in a file by device kind and shape; none if there is no such file.

    Raises:
      ValueError: the file does not hold tunings; says which and why.
    """
    if not path.is_file():
        return {}
    try:
        return {
            device: {shape: Tuning(**sizes) for shape, sizes in rows.items()}
            for device, rows in json.loads(path.read_text()).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold tunings: {error}; `whalejax bench gemm --tune` writes it anew "
            f"once it is deleted"
        ) from error


def write_table(path: Path, tunings: dict[str, dict[str, Tuning]]) -> None:
    """Writes a file for `read_table`, all of it or nothing."""
    rows = {
        device: {shape: dataclasses.asdict(t) for shape, t in by_shape.items()}
        for device, by_shape in tunings.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    temporary.replace(path)
