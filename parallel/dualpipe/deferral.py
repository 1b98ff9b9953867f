"""Weight gradients that wait: input gradients now, for the stage before, the weights' later.

A weight whose gradient shall wait travels through the stage as a `Deferred`, and the matmul that
uses it is written as `deferrable(f, x, w)`. Its backward rule gives, beside the usual gradients,
all that the weight gradient needs (x and the gradient of the output) as the gradient of `slots`,
arrays that no value uses. Slots lie beside the weight in the parameters, so a scan over layers
stacks them as it stacks gradients. Of the gradients and the slots only one is used in a program,
and XLA removes what the other would cost.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.quantization import QuantizedArray
from whalejax.parallel.dualpipe.counting import count_marks, mark, used_inputs


class Record:
    """Calls of `deferrable`, as they are made; equals itself alone, as does a trace that has it."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.calls: list[Call] = []


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "slots"),  # a scan over layers cuts both alike
    meta_fields=("key", "record"),
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A weight whose gradient can wait.

    Attributes:
      value: the weight.
      slots: what takes the gradient's ingredients, the leaves of x and of the output's gradient,
        None for those that are not needed; None while calls are recorded.
      key: which of the stage's parameters it is.
      record: of calls, or None.
    """

    value: Any
    slots: Any
    key: int
    record: Record | None = None

    def __jax_array__(self):
        """Refuses to be used as an array."""
        name = self.record.names[self.key] if self.record else self.key
        raise ValueError(
            f"defer: {name} {list(self.value.shape)} is used outside of deferrable: its gradient "
            f"cannot wait"
        )


class Call(NamedTuple):
    """A call of `deferrable` as it was recorded.

    Attributes:
      f: the function.
      keys: of its weights.
      weights: shapes of the weights, as the call saw them, and their pytree.
      x, y: shapes of its input and output.
    """

    f: Callable
    keys: tuple[int, ...]
    weights: Any
    x: Any
    y: Any


def deferrable(f: Callable, x: Any, w: Any) -> Any:
    """`f(x, w)`, such that the gradient of w can wait if a pipeline wants that.

    Args:
      f: linear in w, and pure; it is called again for the gradients.
      x: pytree of arrays; those of integers, and quantised ones, get no gradient.
      w: an array or a pytree of arrays, parameters of the stage as they are, or as a scan over
        layers cuts them.

    Raises:
      ValueError: some weights of the call can wait, others cannot.
    """
    weights, structure = jax.tree.flatten(w, is_leaf=_is_deferred)
    waiting = [each for each in weights if _is_deferred(each)]
    if not waiting:
        return f(x, w)
    if len(waiting) < len(weights):
        raise ValueError(
            f"deferrable: {len(waiting)} of the {len(weights)} weights of one call are deferred: "
            f"all must be, or none"
        )
    values = structure.unflatten([each.value for each in waiting])
    if waiting[0].record is None:
        slots = waiting[0].slots
        return _deferrable(f, tuple(slot is not None for slot in slots), x, values, slots)
    y = f(x, values)
    keys = tuple(each.key for each in waiting)
    shapes = (jax.tree.map(_shape, tree) for tree in (values, x, y))
    calls = waiting[0].record.calls
    calls.append(Call(f, keys, *shapes))
    return mark(y, _mark_of(len(calls) - 1))


def _mark_of(number):
    """The name of a recorded call in the jaxpr."""
    return f"call {number} of deferrable"


def _is_deferred(leaf):
    return isinstance(leaf, Deferred)


def _shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _deferrable(f, needed, x, w, slots):
    del needed, slots
    return f(x, w)


def _forward(f, needed, x, w, slots):
    del needed, slots
    return f(x, w), (x, w)


def _backward(f, needed, residuals, dy):
    x, w = residuals
    leaves, structure = jax.tree.flatten(x, is_leaf=_is_quantized)
    wide = {i: leaf for i, leaf in enumerate(leaves) if _is_wide(leaf)}

    def of_wide(wide, w):
        return f(structure.unflatten([wide.get(i, leaf) for i, leaf in enumerate(leaves)]), w)

    _, vjp = jax.vjp(of_wide, wide, w)
    dwide, dw = vjp(dy)
    dx = structure.unflatten([dwide.get(i) for i in range(len(leaves))])
    kept = jax.tree.leaves((jax.tree.map(_as_float, x), dy))
    return dx, dw, tuple(a if wanted else None for a, wanted in zip(kept, needed, strict=True))


_deferrable.defvjp(_forward, _backward)


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def _is_wide(leaf):
    """Whether a leaf has a gradient."""
    return not _is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _float_shape(leaf):
    return jax.eval_shape(_as_float, leaf)


def _as_float(leaf):
    """A leaf as a float, as only floats have gradients; counts below 2^24 are exact."""
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.float32)


class Deferral(NamedTuple):
    """The weights of a stage whose gradients wait, and the calls that use them.

    Attributes:
      calls: one for each weight, or for those that are used together.
      stacks: of each call, the axes that its weights have in the parameters before those that the
        call saw: one number for each axis that a scan cuts.
      needed: of each call, which leaves of its input and of its output's gradient the weights'
        gradients depend on.
    """

    calls: tuple[Call, ...]
    stacks: tuple[tuple[int, ...], ...]
    needed: tuple[tuple[bool, ...], ...]

    @property
    def keys(self) -> tuple[int, ...]:
        """All weights that wait."""
        return tuple(key for call in self.calls for key in call.keys)

    def slots(self) -> tuple:
        """Zeros for what each call leaves."""
        found = []
        for call, stack, needed in zip(self.calls, self.stacks, self.needed, strict=True):
            kept = jax.tree.leaves((jax.tree.map(_float_shape, call.x), call.y))
            zeros = (jnp.zeros((*stack, *a.shape), a.dtype) for a in kept)
            found.append(
                tuple(a if wanted else None for a, wanted in zip(zeros, needed, strict=True))
            )
        return tuple(found)

    def defer(self, parameters: Sequence[jax.Array], slots: tuple) -> list:
        """The parameters, with those that wait as `Deferred`."""
        leaves = list(parameters)
        for call, of_call in zip(self.calls, slots, strict=True):
            for place, key in enumerate(call.keys):
                leaves[key] = Deferred(leaves[key], None if place else of_call, key)
        return leaves

    def weight_gradients(self, parameters: Sequence[jax.Array], slots: tuple) -> dict:
        """The gradients of the weights that waited, by key."""
        found = {}
        for call, stack, kept in zip(self.calls, self.stacks, slots, strict=True):
            of_layer = functools.partial(_weight_gradient, call)
            for _ in stack:
                of_layer = functools.partial(lax.map, of_layer)
            weights = [parameters[key] for key in call.keys]
            found.update(zip(call.keys, of_layer((weights, kept)), strict=True))
        return found


def _weight_gradient(call, arguments):
    """Of a call's weights; what was not kept is not needed, and may be anything."""
    weights, kept = arguments
    shapes, tree = jax.tree.flatten((call.x, call.y))
    x, dy = tree.unflatten(
        jnp.zeros(like.shape, like.dtype) if leaf is None else leaf.astype(like.dtype)
        for leaf, like in zip(kept, shapes, strict=True)
    )
    structure = jax.tree.structure(call.weights)
    _, vjp = jax.vjp(lambda *ws: call.f(x, structure.unflatten(ws)), *weights)
    return list(vjp(dy))


def find_calls(
    run: Callable, parameters: Sequence[jax.Array], names: Sequence[str], chosen: Sequence[int]
) -> Deferral:
    """Records how a stage uses the weights that are to wait.

    Args:
      run: calls the stage with parameters of which the chosen ones are `Deferred`.
      parameters: of a stage, a list of arrays.
      names: of them, for messages.
      chosen: indices of those to wait.

    Raises:
      ValueError: one of them is not used in exactly one call of `deferrable`; prints its name.
    """
    record = Record(names)

    def recorded(parameters):
        leaves = list(parameters)
        for key in chosen:
            leaves[key] = Deferred(leaves[key], None, key, record)
        return run(leaves)

    marks = count_marks(jax.make_jaxpr(recorded)(list(parameters)))
    found = ((call, marks[_mark_of(number)]) for number, call in enumerate(record.calls))
    counted = [(call, count) for call, count in found if count]  # loops may have been traced twice
    stacks = [_stack(call, parameters) for call, _ in counted]
    uses = collections.Counter()
    for (call, count), stack in zip(counted, stacks, strict=True):
        once = math.prod(stack) * jax.tree.leaves(call.y)[0].size
        for key in call.keys:
            uses[key] += count // once
    wrong = [f"{names[key]} in {uses[key]}" for key in chosen if uses[key] != 1]
    if wrong:
        raise ValueError(
            f"defer: a weight must be used in exactly one call of deferrable, but a stage uses "
            f"{', '.join(wrong)}"
        )
    calls = tuple(call for call, _ in counted)
    return Deferral(calls, tuple(stacks), tuple(map(_needed, calls)))


def _needed(call):
    """Which leaves of a call's input and of its output's gradient its weights' gradients need."""
    weights = jax.tree.leaves(call.weights)
    kept = jax.tree.leaves((jax.tree.map(_float_shape, call.x), call.y))
    jaxpr = jax.make_jaxpr(functools.partial(_weight_gradient, call))((weights, kept))
    return used_inputs(jaxpr)[len(weights) :]


def _stack(call, parameters):
    """The axes of a call's weights that it did not see."""
    used = jax.tree.leaves(call.weights)
    whole = [parameters[key].shape for key in call.keys]
    stacks, fits = set(), True
    for shape, seen in zip(whole, used, strict=True):
        cut = len(shape) - len(seen.shape)
        stacks.add(shape[:cut])
        fits = fits and shape[cut:] == seen.shape
    if len(stacks) != 1 or not fits:
        raise ValueError(
            f"defer: a call of deferrable saw weights of {[seen.shape for seen in used]}, but they "
            f"are {whole}: only leading axes may be cut off, the same of all"
        )
    return stacks.pop()
