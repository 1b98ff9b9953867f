"""What a backward pass keeps of its forward pass, as arrays that can lie in a slot."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


class Layout(NamedTuple):
    """How a function for gradients, of `jax.vjp`, is put together of arrays.

    Attributes:
      tree: its pytree.
      leaves: of each leaf where it comes from: ("parameter", i) or ("kept", i).
    """

    tree: Any
    leaves: tuple[tuple[str, int], ...]


def take_apart(vjp: Callable, parameters: Sequence[jax.Array]) -> tuple[list[jax.Array], Layout]:
    """The arrays that must be kept, each once; parameters are there anyway.

    A parameter counts as such where it is kept as it is, not where it was cast or multiplied.

    Args:
      vjp: of `jax.vjp`.
      parameters: the very arrays that the function was called with.
    """
    leaves, tree = jax.tree.flatten(vjp)
    known = {id(leaf): ("parameter", i) for i, leaf in enumerate(parameters)}
    kept: list[jax.Array] = []
    for leaf in leaves:
        if id(leaf) not in known:
            known[id(leaf)] = ("kept", len(kept))
            kept.append(leaf)
    return kept, Layout(tree, tuple(known[id(leaf)] for leaf in leaves))


def put_together(
    layout: Layout, kept: Sequence[jax.Array], parameters: Sequence[jax.Array]
) -> Callable:
    """The function for gradients, of what was kept and the parameters."""
    sources = {"kept": kept, "parameter": parameters}
    return layout.tree.unflatten([sources[source][i] for source, i in layout.leaves])
