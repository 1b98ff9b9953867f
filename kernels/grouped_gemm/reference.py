"""The grouped matmul by `lax.ragged_dot`: the definition.

XLA:CPU computes it as one dense matmul per group over all rows, G times the work, so it is the
oracle and not the default.
"""

import jax
import jax.numpy as jnp

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.groups import aligned, real_rows


def why_not(x: jax.Array, w: jax.Array, group_sizes: jax.Array, alignment: int) -> str | None:
    """Runs everywhere."""
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, alignment: int) -> jax.Array:
    """`x[rows of g] @ w[g].T` for each group g; padding rows are zero."""
    padded = aligned(group_sizes, alignment)
    product = jax.lax.ragged_dot_general(
        x,
        w,
        padded,
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        ),
        preferred_element_type=accumulator(x.dtype),
    )
    return jnp.where(real_rows(group_sizes, x.shape[0], alignment)[:, None], product, 0).astype(
        x.dtype
    )
