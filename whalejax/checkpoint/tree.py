"""Pytrees as named leaves: what a checkpoint stores of a tree, and a tree of what it stored."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax
import numpy as np

from whalejax.kernels.quantization import QuantizedArray

ROOT = "%%"  # the name of a tree that is one leaf; no quoted key holds two % in a row
UNQUOTABLE = {"": "%", ".": "%2E", "..": "%2E%2E"}  # keys that would be no folder of their own
KEY_BYTES = 255  # of a folder's name, in the file systems of Linux
VALUES = (bool, int, float, str)  # leaves that go into the manifest as they are


class Leaves(NamedTuple):
    """A tree, taken apart; names are keys joined by slashes, each quoted as in a URL.

    Attributes:
      arrays: `jax.Array`s, PRNG keys among them, and NumPy arrays.
      values: Python's numbers and strings.
      quantized: the static parts of QuantizedArrays, by the name of the node.
    """

    arrays: dict[str, Any]
    values: dict[str, bool | int | float | str]
    quantized: dict[str, dict[str, Any]]


def take_apart(tree: Any) -> Leaves:
    """Names a tree's leaves.

    Raises:
      TypeError: a leaf is of a type that cannot be stored; one error lists them all.
      ValueError: two leaves get one name, as below keys 1 and "1", or a key is too long.
    """
    arrays, values, refused = {}, {}, []
    for name, leaf in named(tree):
        if isinstance(leaf, jax.Array) or _is_plain(leaf):
            arrays[name] = leaf
        elif isinstance(leaf, VALUES):
            values[name] = leaf
        else:
            refused.append(f"{name}: {_described(leaf)}")
    if refused:
        raise TypeError(f"a checkpoint holds arrays, numbers and strings, not {'; '.join(refused)}")
    return Leaves(arrays, values, quantized_in(tree))


def quantized_in(tree: Any) -> dict[str, dict[str, Any]]:
    """The static parts of a tree's QuantizedArrays, concrete or abstract, by name."""
    return {
        name: {"tile": list(node.tile), "scales_by_column": node.scales_by_column}
        for name, node in named(tree, is_leaf=_is_quantized)
        if _is_quantized(node)
    }


def named(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names, in the tree's order.

    Raises:
      ValueError: two leaves get one name, or a key has more bytes than a folder's name may have.
    """
    found = [
        (name_of(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    ]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several leaves are named {', '.join(twice)}: give them other keys")
    long = [name for name in names if any(len(key) > KEY_BYTES for key in name.split("/"))]
    if long:
        raise ValueError(f"keys have more than {KEY_BYTES} bytes, quoted: {', '.join(long)}")
    return found


def name_of(path: Iterable[Any]) -> str:
    """The name of a leaf from its path of keys."""
    return joined(jax.tree_util.keystr((key,), simple=True) for key in path)


def joined(keys: Iterable[str]) -> str:
    """The name of a leaf below these keys."""
    return "/".join(UNQUOTABLE.get(key) or quote(key, safe="") for key in keys) or ROOT


def keys_of(name: str) -> list[str]:
    """The keys that a name consists of."""
    return [_unquoted(key) for key in name.split("/")]


def part_of(node: str, part: str) -> str:
    """The name of an array of a QuantizedArray."""
    return part if node == ROOT else f"{node}/{part}"


def nested(leaves: dict[str, Any], quantized: dict[str, dict[str, Any]]) -> Any:
    """Nested dicts of named leaves; QuantizedArrays are put together again."""
    if ROOT in leaves:
        return leaves[ROOT]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = keys_of(name)
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    if ROOT in quantized:
        return _quantized(tree, quantized[ROOT])
    for name, static in quantized.items():
        *folders, last = keys_of(name)
        node = tree
        for key in folders:
            node = node.get(key, {})
        if len(node.get(last, ())) == 2:  # a subtree may hold one of the two arrays
            node[last] = _quantized(node[last], static)
    return tree


def is_key(leaf: Any) -> bool:
    """Whether a leaf, concrete or abstract, is an array of PRNG keys."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize


def _quantized(parts: dict[str, Any], static: dict[str, Any]) -> QuantizedArray:
    return QuantizedArray(
        parts["values"],
        parts["scales"],
        tuple(static["tile"]),
        scales_by_column=static["scales_by_column"],
    )


def _unquoted(key: str) -> str:
    return "" if key == UNQUOTABLE[""] else unquote(key)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is a NumPy array, or scalar, of numbers."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return False
    if leaf.dtype.type in (np.longdouble, np.clongdouble):  # other bytes on every machine
        return False
    extended = leaf.dtype.type.__module__ == "ml_dtypes"
    return leaf.dtype.kind in "biufc" or extended


def _described(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"{type(leaf).__name__}{'' if dtype is None else f' of {dtype}'}"
