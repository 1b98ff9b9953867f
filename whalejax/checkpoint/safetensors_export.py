"""From a checkpoint, or a tree, to a directory of safetensors files."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from whalejax.checkpoint.manifest import Manifest
from whalejax.checkpoint.reading import read_parts
from whalejax.checkpoint.restoring import whole
from whalejax.checkpoint.safetensors_names import Note, dotted, undotted
from whalejax.checkpoint.store import CheckpointStore
from whalejax.checkpoint.tree import ROOT, is_key, part_of, take_apart
from whalejax.kernels.quantization import QuantizedArray
from whalejax.kernels.quantization.array import scales_shape
from whalejax.storage.memory import host_array
from whalejax.storage.replacement import replacing
from whalejax.storage.safetensors_files import (
    INDEX,
    MAX_SHARD_BYTES,
    NAMES,
    SCALE_SUFFIX,
    SHOWN,
    Spec,
    write_shards,
)


class _Source(NamedTuple):
    """Named leaves, and how to get one of them on the host."""

    specs: dict[str, Spec]
    values: dict[str, Any]
    quantized: dict[str, dict[str, Any]]
    refused: dict[str, str]
    read: Callable[[str], np.ndarray]


class _Tensor(NamedTuple):
    """A tensor to write: what of the tree it is, and how to read it."""

    leaf: str
    spec: Spec
    read: Callable[[], np.ndarray]
    tile: tuple[int, int] | None = None


def export_safetensors(
    source: Any,
    path: Path | str,
    *,
    step: int | None = None,
    subtree: str | None = None,
    name: Callable[[str], str] = dotted,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint, or a tree, as safetensors; the host holds about one array at a time.

    One process calls it. An interrupted export leaves no half directory. A QuantizedArray becomes
    two tensors, its values and, under their name with `_scale_inv` behind it, its scales tile row
    by tile row, as DeepSeek's files have them. What the format has no room for (tiles, numbers,
    strings, keys that hold dots) goes as a note into the headers, for `import_safetensors`.

    Args:
      source: a `CheckpointStore`, of which a step is read and verified; or a tree of arrays,
        numbers and strings.
      path: the directory to make.
      step: of the store; None for the newest.
      subtree: the name of a node, such as `"params/moe_layers"`: only what is below it, under
        names that begin there. None for all.
      name: from a leaf's name to its tensor's; by default its keys with dots between.
      max_shard_bytes: largest size of a file, unless one tensor is larger.
      overwrite: replace a directory of safetensors files that is there.

    Raises:
      FileNotFoundError: there is no such step.
      TypeError: a leaf of the tree is no array, number or string.
      ValueError: safetensors knows no dtype of some leaves, other processes hold parts of them, or
        they get one name: lists all; or there is no such subtree, or `path` is not to be replaced.
        All before anything is written.
      DamagedError: an extent of the checkpoint is damaged; nothing was exported.
    """
    path = Path(path).resolve()
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    _check_target(path, overwrite)
    if isinstance(source, CheckpointStore):
        leaves = _of_step(source, step)
    elif step is None:
        leaves = _of_tree(source)
    else:
        raise ValueError(f"step={step} is for a CheckpointStore, not for a {type(source).__name__}")
    if subtree is not None:
        leaves = _below(leaves, subtree)
    _check(leaves)
    tensors = _tensors(leaves, name)

    def note(names: list[str]) -> dict[str, str]:
        held = {n: tensors[n] for n in names}
        first = next(iter(tensors)) in held
        return Note(
            leaves={n: t.leaf for n, t in held.items() if undotted(n) != t.leaf},
            tiles={n: list(t.tile) for n, t in held.items() if t.tile is not None},
            values=leaves.values if first else {},
        ).encode()

    specs = {n: tensor.spec for n, tensor in tensors.items()}
    with replacing(path) as folder:
        write_shards(folder, specs, lambda n: tensors[n].read(), max_shard_bytes, note)


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give the path of a directory")
    found = sorted(p.name for p in path.iterdir()) if path.exists() else []
    if found and not overwrite:
        raise ValueError(f"{path} exists: give another path, or overwrite=True")
    others = [n for n in found if n != INDEX and not n.endswith(".safetensors")]
    if others:
        raise ValueError(
            f"{path} holds {', '.join(others[:SHOWN])} beside safetensors: give another path"
        )


def _of_tree(tree: Any) -> _Source:
    leaves = take_apart(tree)
    plain = {n: array for n, array in leaves.arrays.items() if not is_key(array)}
    refused = {n: "is PRNG keys" for n in leaves.arrays if n not in plain}
    refused |= {
        n: "has parts in other processes: save it, and export the step"
        for n, array in plain.items()
        if isinstance(array, jax.Array)
        and not (array.is_fully_addressable or array.is_fully_replicated)
    }
    return _Source(
        specs={n: (np.dtype(array.dtype), tuple(array.shape)) for n, array in plain.items()},
        values=leaves.values,
        quantized=leaves.quantized,
        refused=refused,
        read=lambda n: np.asarray(plain[n]),
    )


def _of_step(store: CheckpointStore, step: int | None) -> _Source:
    if step is None:
        steps = store.steps()
        if not steps:
            raise FileNotFoundError(f"{store.place.url} holds no complete checkpoint")
        step = steps[-1]
    manifest: Manifest = store.manifest(step)
    layouts = {n: stored.layout for n, stored in manifest.arrays.items()}

    def read(n: str) -> np.ndarray:
        array = host_array(layouts[n].shape, layouts[n].dtype)
        read_parts(store.place, str(step), {n: (manifest.arrays[n], [whole(array)])})
        return array

    return _Source(
        specs={n: (x.dtype, tuple(x.shape)) for n, x in layouts.items() if x.key is None},
        values=manifest.values,
        quantized=manifest.quantized,
        refused={n: "is PRNG keys" for n, x in layouts.items() if x.key is not None},
        read=read,
    )


def _below(source: _Source, subtree: str) -> _Source:
    """The leaves below a node, named from there."""
    everything = [*source.specs, *source.refused, *source.values, *source.quantized]
    below = f"{subtree}/"
    held = {n: n.removeprefix(below) for n in everything if f"{n}/".startswith(below)}
    held |= {subtree: ROOT} if subtree in held else {}
    if not held:
        there = ", ".join(dict.fromkeys(n.split("/")[0] for n in everything))
        raise ValueError(f"there is no subtree {subtree!r}; nodes at the top: {there}")

    def cut(named: dict[str, Any]) -> dict[str, Any]:
        return {held[n]: leaf for n, leaf in named.items() if n in held}

    names = {name: n for n, name in held.items()}
    return _Source(
        specs=cut(source.specs),
        values=cut(source.values),
        quantized=cut(source.quantized),
        refused=cut(source.refused),
        read=lambda n: source.read(names[n]),
    )


def _check(source: _Source) -> None:
    refused = source.refused | {
        n: f"is {dtype.name}, which safetensors does not know"
        for n, (dtype, _) in source.specs.items()
        if n not in source.refused and dtype not in NAMES
    }
    if refused:
        shown = "; ".join(f"{n} {what}" for n, what in refused.items())
        raise ValueError(f"{len(refused)} leaves cannot be exported as safetensors: {shown}")
    if not source.specs:
        raise ValueError("there is no array to export")


def _tensors(source: _Source, name: Callable[[str], str]) -> dict[str, _Tensor]:
    """All tensors by name, in the tree's order."""
    found: list[tuple[str, _Tensor]] = []
    for leaf, spec in source.specs.items():
        above, _, part = leaf.rpartition("/")
        node = above or ROOT
        if node not in source.quantized:
            found.append((name(leaf), _Tensor(leaf, spec, lambda leaf=leaf: source.read(leaf))))
        elif part == "values":
            found += _of_quantized(source, node, name(node))
    counts = collections.Counter(n for n, _ in found)
    if twice := sorted(n for n, count in counts.items() if count > 1):
        raise ValueError(f"several leaves get the names {', '.join(twice)}: give other ones")
    return dict(found)


def _of_quantized(source: _Source, node: str, name: str) -> list[tuple[str, _Tensor]]:
    static, values = source.quantized[node], source.specs[part_of(node, "values")]
    tile, (scales_dtype, _) = tuple(static["tile"]), source.specs[part_of(node, "scales")]

    def scales() -> np.ndarray:
        return QuantizedArray(
            jax.ShapeDtypeStruct(values[1], values[0]),
            source.read(part_of(node, "scales")),
            tile,
            scales_by_column=static["scales_by_column"],
        ).scales

    of_values = _Tensor(node, values, lambda: source.read(part_of(node, "values")), tile)
    of_scales = _Tensor(
        part_of(node, "scales"), (scales_dtype, scales_shape(values[1], tile)), scales
    )
    return [(name, of_values), (name + SCALE_SUFFIX, of_scales)]
