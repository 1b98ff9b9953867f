"""A user's functions as the executor calls them: on lists of arrays, with all shapes known."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.parallel.dualpipe.deferral import Deferral, find_calls
from whalejax.parallel.dualpipe.residuals import Layout, put_together, take_apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Functions:
    """What a pipeline runs, and the parameters of a stage as a list.

    Attributes:
      first: `(ends, inputs) -> x`, or None where inputs are x.
      stage: `(params, x) -> (x, aux)`.
      prepare: `params -> pytree`, or None; then the stage takes both as a tuple.
      loss: `(ends, x, labels) -> (loss, aux)`.
      structure: pytree of the parameters.
      names: of its leaves.
      trained: indices of the leaves that have a gradient, floats.
      deferred: indices of the leaves whose gradients wait.
    """

    first: Callable | None
    stage: Callable
    loss: Callable
    prepare: Callable | None = None
    structure: Any
    names: tuple[str, ...]
    trained: tuple[int, ...]
    deferred: tuple[int, ...]

    def prepared(self, chunks: Sequence[list]) -> tuple["Functions", tuple[list, ...]]:
        """Parameters of some stages, with what is made of them once behind them; all to be run."""
        if self.prepare is None:
            return self, tuple(chunks)
        each = [self.structure.unflatten(leaves) for leaves in chunks]
        both = [(params, self.prepare(params)) for params in each]
        ready = dataclasses.replace(self, prepare=None, structure=jax.tree.structure(both[0]))
        return ready, tuple(map(jax.tree.leaves, both))

    def enter(self, ends: Any, inputs: Any) -> Any:
        """What travels into the first stage."""
        return inputs if self.first is None else self.first(ends, inputs)

    def run(self, parameters: Sequence[Any], x: Any) -> tuple[Any, Any]:
        """The stage, of a list of parameters."""
        return self.stage(self.structure.unflatten(parameters), x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with what is known of it once it was traced.

    Attributes:
      functions: the user's.
      deferral: the weights whose gradients wait.
      layout: of what a backward pass needs.
      kept: shapes of what is kept of a forward pass, beside parameters.
      slots: shapes of what weight gradients wait for.
      x: shapes of what travels.
      aux: shapes of what a stage reports.
      loss: shape of the loss.
      loss_aux: shapes of what a loss reports.
    """

    functions: Functions
    deferral: Deferral
    layout: Layout
    kept: list
    slots: Any
    x: Any
    aux: Any
    loss: Any
    loss_aux: Any

    def enter_backward(self, ends: Any, inputs: Any, dx: Any) -> Any:
        """The gradient of the ends' parameters on the way into the first stage."""
        _, vjp = jax.vjp(lambda ends: self.functions.enter(ends, inputs), ends)
        return vjp(dx)[0]

    def forward(self, parameters: Sequence[jax.Array], x: Any) -> tuple[Any, list, Any]:
        """The output, what is kept for the backward pass, and what the stage reports."""
        y, aux, vjp = _differentiate(self.functions, self.deferral, parameters, x)
        kept, layout = take_apart(vjp, parameters)
        if layout.leaves != self.layout.leaves:  # a backward pass would read the wrong arrays
            raise AssertionError(f"a stage keeps {layout.leaves}, at first {self.layout.leaves}")
        return y, kept, aux

    def backward(
        self, parameters: Sequence[jax.Array], kept: list, dy: Any
    ) -> tuple[Any, list, Any]:
        """Gradients of the input and of the trained parameters, and what waits in their place.

        What is not used costs nothing: XLA leaves it out.
        """
        gradients, slots, dx = put_together(self.layout, kept, parameters)(dy)
        return dx, gradients, slots

    def without_deferred(self, gradients: list) -> list:
        """Gradients of the trained parameters, None for those that wait."""
        waiting = set(self.deferral.keys)
        return [
            None if key in waiting else gradient
            for key, gradient in zip(self.functions.trained, gradients, strict=True)
        ]

    def weight_gradients(self, parameters: Sequence[jax.Array], slots: Any) -> list:
        """Gradients of the trained parameters that waited, None for the others."""
        found = self.deferral.weight_gradients(parameters, slots)
        return [
            found[key].astype(parameters[key].dtype) if key in found else None
            for key in self.functions.trained
        ]

    def close(self, ends: Any, y: Any, labels: Any) -> tuple[jax.Array, Any, Any, Any]:
        """Loss, what it reports, and the gradients of the output and of the ends' parameters."""

        def of_both(ends, y):
            return self.functions.loss(ends, y, labels)

        (loss, aux), (d_ends, dy) = jax.value_and_grad(of_both, (0, 1), has_aux=True)(ends, y)
        return loss, aux, dy, d_ends


def trace_stage(
    functions: Functions, parameters: Sequence[jax.Array], ends: Any, inputs: Any, labels: Any
) -> Stage:
    """Finds all shapes of a pipeline by tracing its functions, on one microbatch.

    Raises:
      ValueError: what a stage gives does not fit the next one; what travels or a loss is no float;
        a weight that is to wait is not used as it must be; prints the shapes.
    """
    x = jax.eval_shape(functions.enter, ends, inputs)
    _check_floats(x)
    y, _ = jax.eval_shape(functions.run, list(parameters), x)
    if _listed(x) != _listed(y):
        raise ValueError(
            f"a stage gives {_listed(y)}, the next one takes {_listed(x)}: what travels must have "
            f"one structure, and the same shapes and dtypes everywhere"
        )
    loss, loss_aux = jax.eval_shape(functions.loss, ends, y, labels)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss_fn must give a scalar float, gives {_listed(loss)}")

    def run(parameters):
        return functions.run(parameters, jax.tree.map(_zeros, x))

    deferral = find_calls(run, parameters, functions.names, functions.deferred)
    layout = None

    def keep(parameters, x):
        nonlocal layout
        _, aux, vjp = _differentiate(functions, deferral, parameters, x)
        kept, layout = take_apart(vjp, parameters)
        return kept, aux

    kept, aux = jax.eval_shape(keep, list(parameters), x)
    return Stage(
        functions=functions,
        deferral=deferral,
        layout=layout,
        kept=kept,
        slots=jax.eval_shape(deferral.slots),
        x=x,
        aux=aux,
        loss=loss,
        loss_aux=loss_aux,
    )


def _differentiate(functions, deferral, parameters, x):
    """Output, report, and the function from the output's gradient to all others."""

    def run(trained, slots, x):
        leaves = list(parameters)
        for key, leaf in zip(functions.trained, trained, strict=True):
            leaves[key] = leaf
        return functions.run(deferral.defer(leaves, slots), x)

    trained = [parameters[key] for key in functions.trained]
    y, vjp, aux = jax.vjp(run, trained, deferral.slots(), x, has_aux=True)
    return y, aux, vjp


def _check_floats(x):
    wrong = [leaf for leaf in jax.tree.leaves(x) if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if wrong or not jax.tree.leaves(x):
        raise ValueError(
            f"what travels into the first stage must be floats, is {_listed(x)}: give first_fn, "
            f"which makes them of the inputs"
        )


def _listed(tree):
    """Names, dtypes and shapes, to compare and to print."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    shown = (
        f"{jax.tree_util.keystr(path)}{a.dtype}[{','.join(map(str, a.shape))}]"
        for path, a in leaves
    )
    return ", ".join(shown)


def _zeros(like):
    return jnp.zeros(like.shape, like.dtype)
