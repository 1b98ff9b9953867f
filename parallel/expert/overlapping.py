"""Two half-batches through the same layers, so that one's transfers hide behind the other's work.

```
device    attention a | attention b | experts a | experts b | attention a of the next layer ...
network                 dispatch a    dispatch b  combine a   combine b
```

XLA starts a transfer as early and waits for it as late as it sees fit. Two things would leave it
nothing to hide a transfer behind. One is the edge of the loop over layers: the last combine is
carried over it. The other is that XLA fuses alike parts of both halves, which then run together and
send together: so each stage of a half is held back until the other half's rows are ready to leave.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HALVES = ("half0", "half1")  # named scopes: profiles tell the half-batches apart


class Stages(NamedTuple):
    """A layer, cut where tokens travel.

    Attributes:
      send: `(p, x, constant, hold) -> (kept, arrived, held, y)`: all up to the experts. What came
        over the network is in `arrived`, `held` is what `dispatch` makes of `hold`, and y is what
        the layer reports.
      compute: `(p, kept, arrived) -> (x, outputs)`: the experts, up to the outputs' way back.
      receive: `(x, outputs) -> x`: the way back; zeros for `outputs` must leave x as it is.
    """

    send: Callable
    compute: Callable
    receive: Callable


def overlap_microbatches(
    stages: Stages,
    layers: Any,
    halves: tuple[Any, Any],
    *,
    constants: tuple[Any, Any] = (None, None),
    policy: Callable | None = None,
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Runs two half-batches through stacked layers, as `lax.scan` would run each.

    What it costs is one more combine than there are layers, of zeros. On GPUs XLA must not merge
    the matmuls of both halves: compile with `parallel.runtime.OVERLAP_OPTIONS`.

    Args:
      stages: of a layer.
      layers: pytree of arrays `[layers, ...]`; slices of it are the stages' p.
      halves: x of both half-batches, pytrees of arrays of equal shapes.
      constants: of both half-batches, the same for all layers.
      policy: of `jax.checkpoint`, for all but the second half's last transfer; None keeps all that
        the backward pass needs.

    Returns:
      x of both after all layers, and the ys of both, stacked.
    """

    def body(carry, p):
        first, second = carry
        with jax.named_scope(HALVES[1]):
            second = stages.receive(*second)
        (first, second), ys = rest((first, second), p)
        with jax.named_scope(HALVES[0]):
            first = stages.receive(*first)
        return (first, second), ys

    def rest(halves, p):
        return interleave(stages, p, halves, constants)

    if policy is not None:
        rest = jax.checkpoint(rest, policy=policy, prevent_cse=False)
    one = jax.tree.map(lambda a: a[0], layers)
    (_, (_, outputs)), _ = jax.eval_shape(rest, halves, one)
    first, second = halves
    carry = first, (second, jax.tree.map(_zeros, outputs))
    (first, second), ys = lax.scan(body, carry, layers)
    with jax.named_scope(HALVES[1]):
        return (first, stages.receive(*second)), ys


def interleave(
    stages: Stages, p: Any, halves: tuple[Any, Any], constants: tuple[Any, Any]
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Runs one layer on both half-batches, up to the outputs' way back.

    Returns:
      For each half what `stages.receive` takes, and its y.
    """
    first, second = halves
    with jax.named_scope(HALVES[0]):
        *first, second, y = stages.send(p, first, constants[0], second)
    with jax.named_scope(HALVES[1]):
        *second, first, y_2nd = stages.send(p, second, constants[1], first)
    with jax.named_scope(HALVES[0]):
        x, outputs = stages.compute(p, *first)
        outputs, second = lax.optimization_barrier((outputs, second))
    with jax.named_scope(HALVES[1]):
        second = stages.compute(p, *second)
    return ((x, outputs), second), (y, y_2nd)


def _zeros(like):
    """Zeros that differ between devices as something else does, for the carry of a loop."""
    zeros = jnp.zeros(like.shape, like.dtype)
    varying = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    return lax.pcast(zeros, varying, to="varying") if varying else zeros
