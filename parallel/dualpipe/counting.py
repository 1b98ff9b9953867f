"""How often parts of a traced function run, counted in its jaxpr."""

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
