"""The grouped matmul as one batched matmul over tiles of rows.

Groups start on tile boundaries, so a tile of `alignment` rows belongs to one group: each tile is
multiplied by its group's weight, gathered. The work follows the rows, not the number of groups;
the gathered weights cost memory (tiles x N x K), which suits small experts and CPUs.
"""

import jax
import jax.numpy as jnp

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.groups import group_of_tiles, real_rows


def why_not(x: jax.Array, w: jax.Array, group_sizes: jax.Array, alignment: int) -> str | None:
    """Runs everywhere."""
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, alignment: int) -> jax.Array:
    """`x[rows of g] @ w[g].T` for each group g; padding rows are zero."""
    num_tiles = x.shape[0] // alignment
    tiles = x.reshape(num_tiles, alignment, x.shape[1])
    weights = gather_weights(w, group_of_tiles(group_sizes, num_tiles, alignment))
    wide = accumulator(x.dtype)
    product = jnp.einsum("tmk,tnk->tmn", tiles, weights, preferred_element_type=wide)
    product = product.reshape(x.shape[0], w.shape[1])
    return jnp.where(real_rows(group_sizes, x.shape[0], alignment)[:, None], product, 0).astype(
        x.dtype
    )


@jax.custom_vjp
def gather_weights(w: jax.Array, tile_group: jax.Array) -> jax.Array:
    """`w[tile_group]`; its gradient sums tiles by a matmul, since scatters are slow."""
    return w[tile_group]


def _gather_forward(w, tile_group):
    return w[tile_group], (tile_group, w.shape[0])


def _gather_backward(residuals, d_tiles):
    tile_group, num_groups = residuals
    members = jax.nn.one_hot(tile_group, num_groups, dtype=d_tiles.dtype, axis=0)
    flat = d_tiles.reshape(d_tiles.shape[0], -1)
    d_w = jnp.dot(members, flat, preferred_element_type=accumulator(flat.dtype))
    return d_w.reshape(num_groups, *d_tiles.shape[1:]).astype(d_tiles.dtype), None


gather_weights.defvjp(_gather_forward, _gather_backward)
