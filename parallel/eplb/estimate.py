"""The load of experts as it is expected to go on: a moving average of what routers counted."""

import jax
import jax.numpy as jnp
import numpy as np


def update_estimate(estimate: jax.Array, counts: jax.Array, decay: float) -> jax.Array:
    """Takes a step's counts into the average.

    Starts from zeros. After n steps a layer sums to `1 - decay**n`, by which `read_estimate`
    divides: so the first steps weigh as much as their age says, and no counter is needed.

    Args:
      estimate: `f32[layers, E]`, of earlier steps.
      counts: `i32|f32[layers, E]`, tokens of each expert.
      decay: what an earlier step still counts after each later one, from 0 to below 1.

    Returns:
      `f32[layers, E]`, of shares of a layer's choices.

    Raises:
      ValueError: `decay` is out of range, or the shapes differ; prints them.
    """
    if not 0 <= decay < 1 or estimate.shape != counts.shape:
        raise ValueError(
            f"update_estimate: decay={decay} must be from 0 to below 1, and counts of shape "
            f"{counts.shape} like the estimate's {estimate.shape}"
        )
    counts = counts.astype(jnp.float32)
    total = jnp.sum(counts, axis=-1, keepdims=True)
    return decay * estimate + (1 - decay) * (counts / jnp.maximum(total, 1))


def read_estimate(estimate: np.ndarray) -> np.ndarray:
    """The expected share of each expert, `f64[layers, E]`; equal ones where nothing was counted."""
    estimate = np.asarray(estimate, np.float64)
    total = estimate.sum(axis=-1, keepdims=True)
    equal = np.full_like(estimate, 1 / estimate.shape[-1])
    return np.divide(estimate, total, out=equal, where=total > 0)
