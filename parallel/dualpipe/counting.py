"""What a jaxpr tells of a traced function: how often parts of it run, and what they need."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def mark(tree: Any, name: str) -> Any:
    """The same values, such that `count_marks` finds how often they are computed."""
    first, *others = jax.tree.leaves(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [checkpoint_name(first, name), *others])


def count_marks(jaxpr: Any) -> collections.Counter:
    """Of each name that was marked, the elements that all its first leaves have together.

    A scan counts as often as it turns, a function that was traced once as often as it is called,
    and what `vmap` repeats as often as it does: all of these show only here, not while Python runs.

    Args:
      jaxpr: of `jax.make_jaxpr`.
    """
    found = collections.Counter()

    def visit(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "name":
                found[equation.params["name"]] += times * equation.outvars[0].aval.size
            turns = equation.params["length"] if equation.primitive.name == "scan" else 1
            for inner in _inner(equation.params):
                visit(inner, times * turns)

    visit(jaxpr.jaxpr, 1)
    return found


def _inner(parameters) -> Iterator:
    """The jaxprs among an equation's parameters."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def used_inputs(jaxpr: Any) -> tuple[bool, ...]:
    """Which inputs of a function its outputs depend on.

    An operation that contains others is taken to use all that it is given.

    Args:
      jaxpr: of `jax.make_jaxpr`.
    """
    needed = set(map(id, jaxpr.jaxpr.outvars))
    for equation in reversed(jaxpr.jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed.update(map(id, equation.invars))
    return tuple(id(variable) in needed for variable in jaxpr.jaxpr.invars)
