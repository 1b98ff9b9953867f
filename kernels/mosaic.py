"""Parts that the Mosaic GPU kernels share: the order of tiles, and how tiles lie in SMEM.

A persistent kernel's work is a table in GMEM, a list of items for each CTA: reading an item costs
fewer registers than computing it, and a table made on the device follows sizes known only there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SMEM_BYTES = 232_448  # what a CTA may have on Hopper
SMEM_ROUNDING = 1024  # every scratch buffer starts on a multiple of this
NUM_SMS = 132  # of an H100 SXM, H200 and H20; assumed where there is no GPU to ask
LOADER_REGISTERS, MATH_REGISTERS = 24, 240  # of a thread, one loading and two math warpgroups
COUNT = 7  # the last int32 of an item: with it, 32 bytes, a sector


class Items(NamedTuple):
    """Work of each CTA in order; all `i32[ctas, length]` but counts.

    Attributes:
      row: tile of rows.
      column: tile of columns.
      counts: `i32[ctas]`, how many items each CTA has.
    """

    row: Any
    column: Any
    counts: Any


def deal(
    rows: Any,
    columns: int,
    *,
    max_rows: int,
    width: int,
    ctas: int,
    group: tuple[int, int],
    bands: str = "rows",
):
    """Deals a grid of tiles to clusters of CTAs, so that tiles worked on together lie together.

    Tiles are walked in bands of `width` rows, column by column, every other band backwards: the
    operands of the tiles under way at one time stay in the L2. Or in bands of columns, row by row.

    Args:
      rows: tiles along M: an int, or an int32 scalar known on the device alone.
      columns: tiles along N.
      max_rows: largest value of `rows`.
      width: rows of a band, in clusters.
      ctas: CTAs of the launch, a multiple of the cluster's size.
      group: a cluster's tiles along M and N.
      bands: of `"rows"` or `"columns"`.

    Returns:
      `Items`, of numpy arrays where `rows` is an int. A cluster's last tiles may lie past the grid.
    """
    xp = np if isinstance(rows, int) else jnp
    down, across = group
    clusters = ctas // (down * across)
    cluster_rows, cluster_columns = -(-rows // down), -(-columns // across)
    length = -(-(-(-max_rows // down) * cluster_columns) // clusters)
    total = cluster_rows * cluster_columns
    # the item of turn t of cluster c is number t * clusters + c
    i = np.arange(length, dtype=np.int32)[None] * clusters
    i = i + np.arange(clusters, dtype=np.int32)[:, None]
    row, column = place(i, cluster_rows, cluster_columns, width, bands, xp)
    peer = np.arange(down * across, dtype=np.int32)[None, :, None]
    row = row[:, None] * down + (peer if down > 1 else 0 * peer)
    column = column[:, None] * across + (peer if across > 1 else 0 * peer)
    counts = xp.maximum(total - np.arange(clusters, dtype=np.int32) + clusters - 1, 0) // clusters
    each = xp.repeat(counts, down * across)
    as_rows = (ctas, length)
    return Items(
        row.reshape(as_rows).astype(np.int32),
        column.reshape(as_rows).astype(np.int32),
        each.astype(np.int32),
    )


def place(
    i: Any, rows: Any, columns: Any, width: int, bands: str = "rows", xp: Any = jnp
) -> tuple[Any, Any]:
    """Row and column of the i-th tile, or cluster of tiles, in a grid; see `deal`."""
    if bands == "columns":
        column, row = place(i, columns, rows, width, xp=xp)
        return row, column
    band, inside = i // (width * columns), i % (width * columns)
    in_band = xp.maximum(xp.minimum(width, rows - band * width), 1)
    column = inside // in_band
    column = xp.where(band % 2 == 1, columns - 1 - column, column)
    return band * width + inside % in_band, column


def transforms(columns: int, dtype: Any) -> tuple:
    """How a tile lies in SMEM for wgmma and TMA: rows of `columns` elements, swizzled if can be."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = columns * jnp.dtype(dtype).itemsize
    if swizzle not in (32, 64, 128):
        return ()
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def panel_columns(columns: int, edge: int, dtype: Any) -> int:
    """Columns of the panels in which a tile of `columns` leaves through SMEM.

    The widest that TMA can swizzle and that divides `edge`, at whose multiples the tile is written;
    the whole tile, not swizzled, where there is none.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for swizzle in (128, 64, 32):
        if edge * itemsize % swizzle == 0:
            return swizzle // itemsize
    return columns


def flat(ref: Any) -> Any:
    """A view of SMEM for TMA, of a buffer whose rows are one swizzle wide.

    wgmma wants such a buffer tiled by 8 rows. TMA takes tiles only from arrays that they divide,
    but clips what it moves without tiles at any row and column: and where one tile is as wide as a
    row, both lie in memory alike. Interpret mode knows no such view, and clips tiles too.
    """
    if len(getattr(ref, "transforms", ())) != 2 or interpreted():
        return ref
    swizzle, _ = ref.transforms
    *leading, _, _, _, columns = ref.ref.shape
    view = ref.ref.reshape((*leading, ref.shape[-2], columns))
    return dataclasses.replace(view, transforms=(*view.transforms, swizzle))


def for_tma(ref: Any, rows: int, columns: int) -> Any:
    """A view of SMEM for TMA to and from an array of `rows` and `columns`: `flat` where it must be.

    Moving tiles is faster: 3 % of a matmul's time on an H100. Not where a row is one tile: Mosaic
    drops that axis of length 1 together with its index, and what should be stored past the array
    lands in it.
    """
    width = ref.shape[-1]
    return ref if rows % 8 == 0 and columns % width == 0 and columns > width else flat(ref)


def interpreted() -> bool:
    """Whether kernels are traced for Pallas' GPU interpreter; JAX has no public name for it."""
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def unvarying(arrays: Any) -> Any:
    """The same arrays, typed as outside of `jax.shard_map`: a pytree of them.

    A kernel works on what its device holds, and `plgpu.warp_map` refuses references whose type says
    that devices differ. JAX has no public cast for it: with the check switched off, as it is inside
    of a kernel, an operation's result varies over nothing. XLA removes the operation.
    """
    from jax._src import config

    def cast(x):
        if not jax.typeof(x).manual_axis_type.varying:
            return x
        return jax.lax.bitcast_convert_type(x, x.dtype)

    with config._check_vma(False):
        return jax.tree.map(cast, arrays)


def compiler_params() -> Any:
    """What all kernels are compiled with: barriers and reductions' scratch are their own affair."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def next_slot(stages: int, slot: jax.Array) -> jax.Array:
    """The ring's slot after `slot`. Loops carry slots: a remainder each time costs more."""
    return jnp.where(slot == stages - 1, 0, slot + 1)


def rounded(num_bytes: int) -> int:
    """Bytes of SMEM that a scratch buffer takes."""
    return -(-num_bytes // SMEM_ROUNDING) * SMEM_ROUNDING


def num_sms() -> int:
    """Multiprocessors of the default GPU; those of an H100 where there is none."""
    if jax.default_backend() != "gpu":
        return NUM_SMS
    return getattr(jax.devices()[0], "core_count", NUM_SMS)


def table(items: Items, *columns: Any) -> jax.Array:
    """Packs int32 arrays `[ctas, length]` into `i32[ctas, length, 8]`: an item a sector.

    Its last column says how many items the CTA has: a CTA's first read tells it all, where a read
    for the count and one for the item would cost the memory's latency twice.
    """
    xp = np if all(isinstance(c, np.ndarray) for c in (items.counts, *columns)) else jnp
    counts = xp.broadcast_to(items.counts[:, None], items.row.shape)
    rest = [xp.zeros_like(counts)] * (COUNT - len(columns))
    return jnp.asarray(xp.stack([*columns, *rest, counts], axis=-1))


def read(items: Any, cta: jax.Array, i: jax.Array, fields: int) -> list[jax.Array]:
    """The first `fields` columns of item i, or of the last there is room for, in a kernel."""
    i = jnp.minimum(i, items.shape[1] - 1)
    return [items[cta, i, field] for field in range(fields)]
