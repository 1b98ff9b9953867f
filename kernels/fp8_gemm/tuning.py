"""Tile sizes of the FP8 matmul kernels: what fits, what a shape wants, what was measured."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from whalejax.kernels.mosaic import SMEM_BYTES, rounded

BLOCK_K = 128  # elements of K that share a scale: one slot of the ring
WARPGROUP_ROWS = 64  # rows of a wgmma
PANEL_ROWS = 8  # rows of an operand that a CTA of a cluster loads at least
MAX_STAGES = 16
WALK_WORDS = 8  # int32 that say in SMEM which item a slot belongs to, or where a group lies
TABLE = Path(__file__).with_name("tuning_table.json")
USER_TABLE = Path.home() / ".cache" / "whalejax" / "fp8_gemm_tuning.json"


def walk_bytes(stages: int, groups: int) -> int:
    """SMEM of a CTA for items, groups and barriers."""
    return rounded((stages + groups + 1) * WALK_WORDS * 4) + rounded(2 * stages * 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How one CTA works.

    Attributes:
      tile_m: rows of a tile: 64 for one math warpgroup, 128 for two, 256 for two in two waves.
      tile_n: columns of a tile.
      stages: slots of the ring through which K blocks pass.
      cluster: CTAs that share one operand by multicast.
      share: the operand that they share: `"w"` stacks their tiles along M, `"x"` along N.
      width: clusters across a band, see `mosaic.place`.
      bands: of `"rows"`, or of `"columns"`.
    """

    tile_m: int = 128
    tile_n: int = 192
    stages: int = 4
    cluster: int = 1
    share: str = "w"
    width: int = 8
    bands: str = "rows"

    def __post_init__(self):
        widest = 128 if self.tile_m == 256 else 256
        if self.tile_m not in (64, 128, 256) or self.tile_n % 8 or not 8 <= self.tile_n <= widest:
            raise ValueError(
                f"tile_m={self.tile_m} must be 64, 128 or 256, tile_n={self.tile_n} a multiple of "
                f"8 and at most {widest}"
            )
        if self.share not in ("w", "x") or self.bands not in ("rows", "columns"):
            raise ValueError(
                f"share={self.share!r} must be 'w' or 'x', bands={self.bands!r} 'rows' or 'columns'"
            )
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")
        shared = self.tile_n if self.share == "w" else self.tile_m
        if shared % (PANEL_ROWS * self.cluster):
            raise ValueError(
                f"tile_{'n' if self.share == 'w' else 'm'}={shared}, shared by "
                f"cluster={self.cluster}, must be a multiple of {PANEL_ROWS * self.cluster}"
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

    def smem_bytes(self, out_itemsize: int, groups: int = 1) -> int:
        """SMEM of a CTA: the ring, scales, the output on its way, items, groups, barriers."""
        return (
            rounded(self.stages * self.tile_m * BLOCK_K)
            + rounded(self.stages * self.tile_n * BLOCK_K)
            + rounded(self.stages * self.tile_m * 4)
            + rounded(self.stages * 3 * BLOCK_K)  # of w: at most 3 blocks of 32 scales
            + rounded(self.tile_m * self.tile_n * out_itemsize)
            + walk_bytes(self.stages, groups)
        )

    def fits(self, out_itemsize: int, groups: int = 1) -> bool:
        """Whether a CTA has the SMEM."""
        return self.smem_bytes(out_itemsize, groups) <= SMEM_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class WgradTuning:
    """How one CTA works on a weight gradient; see `Tuning`."""

    tile_m: int = 128
    tile_n: int = 128
    stages: int = 4
    width: int = 8

    def __post_init__(self):
        widest = 128 if self.tile_m == 256 else 160
        if self.tile_m not in (128, 256) or self.tile_n % 32 or not 32 <= self.tile_n <= widest:
            raise ValueError(
                f"tile_m={self.tile_m} must be 128 or 256, tile_n={self.tile_n} a multiple of 32 "
                f"and at most {widest}"
            )

    warpgroups = 2

    @property
    def waves(self) -> int:
        """How often a warpgroup's 64 rows fit in its share of a tile."""
        return self.tile_m // (WARPGROUP_ROWS * self.warpgroups)

    def smem_bytes(self, groups: int = 1) -> int:
        """SMEM of a CTA; see `Tuning`."""
        operands = self.tile_m + self.tile_n
        return (
            rounded(self.stages * operands * BLOCK_K)
            + rounded(self.stages * self.tile_m * 4)
            + rounded(self.stages * self.tile_n * 4)
            + rounded(self.warpgroups * WARPGROUP_ROWS * self.tile_n * 4)
            + walk_bytes(self.stages, groups)
        )


# The cost model, fitted to an H100 SXM: microseconds.
START_US = 3.0  # launch, first loads, last stores
CYCLES_PER_US = 1600  # the clock that power leaves a busy tensor core
SMEM_BYTES_PER_CYCLE = 128
PROMOTION = {1: 1.14, 2: 1.1}  # how much longer products take for promotion, by waves
ODD_WIDTH = 1.1  # where tiles start inside of a panel or of a block of scales
STORE_US, STORE_US_PER_COLUMN = 0.25, 0.0027  # what of an epilogue of 128 rows nothing hides
L2_BYTES_PER_US, STREAMED_BYTES_PER_US = 74_000, 67_000  # that one SM takes in
MISALIGNED = 0.8  # of it, where rows do not start on multiples of 128 bytes
L2_BYTES = 50_000_000  # operands larger than that stream through the L2
HBM_BYTES_PER_US = 2.9e6
SHORT_K = 2048  # below it, what is written decides more than what is read


def pick(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    out_itemsize: int,
    ctas: int,
    device: str | None = None,
) -> Tuning:
    """The tuning for `[m, k]` times `[n, k]`: measured if there is one, else by the cost model.

    Args:
      m, n, k: sizes; m of each group's rows.
      groups: such products that are computed together.
      out_itemsize: bytes of an output element.
      ctas: multiprocessors of the device.
      device: its kind, for the table of what was measured.
    """
    measured = table().get(device, {}).get(shape_key(m, n, k, out_itemsize))
    if measured is not None:
        return measured
    return ranked(m, n, k, groups=groups, out_itemsize=out_itemsize, ctas=ctas)[0]


def shape_key(m: int, n: int, k: int, out_itemsize: int) -> str:
    """A shape's name in a table."""
    return f"{m}x{n}x{k}x{out_itemsize}"


def ranked(
    m: int, n: int, k: int, *, groups: int = 1, out_itemsize: int, ctas: int
) -> list[Tuning]:
    """The tunings worth a thought, the fastest by the cost model first; see `pick`."""
    found = candidates(m, n, k, out_itemsize, groups)
    return sorted(found, key=lambda t: cost_us(t, m, n, k, ctas, groups))


def candidates(m: int, n: int, k: int, out_itemsize: int, groups: int = 1) -> list[Tuning]:
    """Tiles of every width, alone and in clusters of two, with as deep a ring as fits."""
    alone, beside, above = (1, "w"), (2, "x"), (2, "w")
    narrow = [16] if n < 32 else [32, 48, 56, 64, 96, 128]
    wide = [16] if n < 32 else [*range(32, 193, 16), 56]
    heights: dict[int, tuple[list[int], list[tuple[int, str]]]] = {}
    if m <= 64:
        heights[64] = narrow, [beside, alone]
    elif m <= 128:
        heights[64] = narrow, [beside, above, alone]
        heights[128] = wide, [alone]
    else:
        heights[128] = wide, [alone, above]
        heights[256] = [n for n in wide if 64 <= n <= 128], [beside, alone]
    found = [
        deepest(k, out_itemsize, groups, tile_m=tile_m, tile_n=tile_n, cluster=cluster, share=share)
        for tile_m, (widths, clusters) in heights.items()
        for tile_n in widths
        for cluster, share in clusters
        if share != "w" or tile_n % (PANEL_ROWS * cluster) == 0
    ]
    return [t for t in found if t is not None]


def deepest(k: int, out_itemsize: int, groups: int = 1, **sizes: Any) -> Tuning | None:
    """The tuning of these sizes with the most stages that fit, if three do.

    Two tiles that lie side by side are walked in bands of columns, which keeps what they write
    together: the narrower, the better where writing takes the most time.
    """
    beside = sizes.get("cluster", 1) > 1 and sizes.get("share") == "x"
    short = k < SHORT_K
    walk = (
        {"bands": "columns", "width": 4 if short else 8}
        if beside
        else {"bands": "rows", "width": 32 if k < SHORT_K // 2 else 8}
    )
    tunings = (Tuning(stages=stages, **sizes, **walk) for stages in range(MAX_STAGES, 2, -1))
    return next((t for t in tunings if t.fits(out_itemsize, groups)), None)


def cost_us(t: Tuning, m: int, n: int, k: int, ctas: int, groups: int = 1) -> float:
    """What a matmul takes by the cost model: whole waves of tiles, or the memory's time."""
    down, across = t.group
    if groups == 1:
        rows = -(-m // (t.tile_m * down))
    else:  # sizes differ: half of a last tile is empty, and none is left over
        rows = max(1, m / t.tile_m + 0.5) * groups / down
    clusters = math.ceil(rows * -(-n // (t.tile_n * across)))
    waves, blocks = -(-clusters // (ctas // t.cluster)), -(-k // BLOCK_K)
    operands = groups * (m + n) * k
    rate = L2_BYTES_PER_US if operands < L2_BYTES else STREAMED_BYTES_PER_US
    rate *= MISALIGNED if k % BLOCK_K else 1
    loads = (t.tile_m / across + t.tile_n / down) * BLOCK_K / rate
    store = (STORE_US + STORE_US_PER_COLUMN * t.tile_n) * t.tile_m / 128
    tiles = waves * (blocks * max(block_us(t), loads) + store)
    memory = (operands + groups * 2 * m * n) / HBM_BYTES_PER_US
    return START_US + max(tiles, memory) + 0.1 * min(tiles, memory)


def block_us(t: Tuning) -> float:
    """What a K block takes: its products' time in the tensor core, or SMEM's, which is longer.

    SMEM is written once by TMA, and read for the product of every 64 rows.
    """
    products = t.tile_m // WARPGROUP_ROWS
    rows_moved = products * (WARPGROUP_ROWS + t.tile_n) + t.tile_m + t.tile_n
    cycles = max(
        rows_moved * BLOCK_K / SMEM_BYTES_PER_CYCLE, PROMOTION[t.waves] * products * 2 * t.tile_n
    )
    return cycles / CYCLES_PER_US * (1 if t.tile_n % 64 == 0 else ODD_WIDTH)


# Weight gradients: microseconds of a block of tokens, and of a tile beside.
WGRAD_US = {
    WgradTuning(tile_m=128, stages=4): (0.544, 1.2),
    WgradTuning(tile_m=256, stages=3): (0.944, 2.5),
}


def pick_wgrad(n: int, k: int, tokens: int, *, groups: int = 1, ctas: int) -> WgradTuning:
    """The fastest tuning for a gradient `[groups, n, k]` by the cost model.

    Args:
      n, k: sizes of a weight.
      tokens: of all groups together.
      groups: weights.
      ctas: multiprocessors of the device.
    """
    blocks = tokens / BLOCK_K / groups

    def cost_us(t):
        block_us, tile_us = WGRAD_US[t]
        tiles = groups * -(-n // t.tile_m) * -(-k // t.tile_n)
        return -(-tiles // ctas) * (blocks * block_us + tile_us)

    return min(WGRAD_US, key=cost_us)


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
