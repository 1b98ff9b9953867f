"""Parts that the Mosaic GPU kernels share: the order of tiles, and how tiles lie in SMEM."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SMEM_BYTES = 232_448  # what a CTA may have on Hopper
SMEM_ROUNDING = 1024  # every scratch buffer starts on a multiple of this
NUM_SMS = 132  # of an H100 SXM, H200 and H20; assumed where there is no GPU to ask
LOADER_REGISTERS, MATH_REGISTERS = 24, 240  # of a thread, one loading and two math warpgroups


def place(i: Any, rows: Any, columns: Any, width: Any, bands: str = "rows") -> tuple[Any, Any]:
    """Row and column of the i-th tile of a grid, in an order that keeps tiles' operands in the L2.

    Tiles are walked in bands of `width` rows, column by column, every other band backwards. Or in
    bands of columns, row by row.

    Quotients are `lax`'s: those of `//` round down, and take Mosaic as long to lower as the rest of
    a kernel.

    Args:
      i: number of the tile.
      rows, columns: of the grid: an int, or an int32 scalar known on the device alone.
      width: of a band.
      bands: of `"rows"` or `"columns"`.
    """
    if bands == "columns":
        column, row = place(i, columns, rows, width)
        return row, column
    band, inside = lax.div(i, width * columns), lax.rem(i, width * columns)
    in_band = jnp.maximum(jnp.minimum(width, rows - band * width), 1)
    column = lax.div(inside, in_band)
    column = jnp.where(lax.rem(band, 2) == 1, columns - 1 - column, column)
    return band * width + lax.rem(inside, in_band), column


def turns(tiles: Any, worker: Any, workers: int) -> Any:
    """How many tiles are a worker's, where each has one of `workers` in turn."""
    return lax.div(tiles + workers - 1 - worker, workers)


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


def call(build: Callable[..., Any], *sizes: Hashable, arguments: tuple) -> Any:
    """`build(*sizes)(*arguments)`, lowered once for all of a program's calls that are alike.

    A training step has hundreds, and Mosaic takes half a second for each.
    """
    return _call(build, sizes, interpreter(), arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(build, sizes, interpreter, arguments):
    return build(*sizes)(*arguments)


def interpreter() -> Any:
    """What Pallas' GPU interpreter runs kernels with, None where it does not; no public name."""
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value


def interpreted() -> bool:
    """Whether kernels are traced for Pallas' GPU interpreter."""
    return interpreter() is not None


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
