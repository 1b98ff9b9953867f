"""From a directory of safetensors files to a tree, or to a checkpoint."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from whalejax.checkpoint.safetensors_names import Note, read_note, undotted
from whalejax.checkpoint.store import CheckpointStore
from whalejax.checkpoint.tree import nested, part_of
from whalejax.kernels.quantization.array import scales_shape
from whalejax.storage.safetensors_files import (
    SCALE_SUFFIX,
    StoredTensor,
    find_tensors,
    read_header,
    view_tensors,
)

TILE = (128, 128)  # of published FP8 weights
FP8 = ("float8_e4m3fn", "float8_e5m2")


def import_safetensors(
    path: Path | str,
    store: CheckpointStore,
    step: int,
    *,
    name: Callable[[str], str] | None = None,
    tile: tuple[int, int] = TILE,
    metadata: Any = None,
) -> None:
    """Saves what safetensors files hold as a checkpoint, complete when this returns.

    Args:
      path, name, tile: as `read_safetensors`.
      store: where to.
      step: a number that has no checkpoint yet.
      metadata: JSON to keep with it.

    Raises:
      FileNotFoundError, ValueError: as `read_safetensors`, or as `CheckpointStore.save`; nothing
        was written.
      OSError: the checkpoint could not be written.
    """
    tree = read_safetensors(path, name=name, tile=tile)
    store.save(step, tree, metadata=metadata, block=True)


def read_safetensors(
    path: Path | str,
    *,
    name: Callable[[str], str] | None = None,
    tile: tuple[int, int] = TILE,
) -> Any:
    """The tensors of safetensors files as nested dicts of NumPy arrays.

    The arrays are the files' own bytes, mapped into memory: the host reads what is touched, and
    the files must stay as they are while the arrays live. Only the scales of FP8 are copied. An
    FP8 tensor `X` beside an `X_scale_inv` becomes a QuantizedArray; in files of
    `export_safetensors` those do that were one.

    Args:
      path: a directory, with an index or without, or one file.
      name: from a tensor's name to the leaf's, of keys with slashes between; None for what the
        files say, and without a word of theirs for the name with its dots as slashes.
      tile: of FP8 tensors in files that say nothing.

    Returns:
      The tree, with the numbers and strings that `export_safetensors` was given.

    Raises:
      FileNotFoundError: there are no such files.
      ValueError: a file is corrupt; scales do not fit their tensor, or two tensors one tree: lists
        all.
    """
    path = Path(path)
    stored = read_header(path) if path.is_file() else find_tensors(path)
    notes = {file: read_note(file) for file in {tensor.file for tensor in stored.values()}}
    tiles = _tiles(stored, notes, tile)
    values = {n: v for note in notes.values() if note is not None for n, v in note.values.items()}
    named = _named(stored, notes, tiles, name)
    _check_tree(path, [*(leaf for leaf, _ in named), *values])
    arrays, leaves, quantized = view_tensors(stored), values, {}
    for leaf, tensor in named:
        if tensor not in tiles:
            leaves[leaf] = arrays[tensor]
            continue
        quantized[leaf] = {"tile": tiles[tensor], "scales_by_column": False}
        leaves[part_of(leaf, "values")] = arrays[tensor]
        leaves[part_of(leaf, "scales")] = arrays[tensor + SCALE_SUFFIX].astype(np.float32)
    return nested(leaves, quantized)


def _tiles(
    stored: dict[str, StoredTensor], notes: dict[Path, Note | None], tile: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """The tile of every tensor that has scales."""
    tiles, faults = {}, []
    for name, tensor in stored.items():
        note, scales = notes[tensor.file], stored.get(name + SCALE_SUFFIX)
        if note is None and scales is not None and tensor.dtype.name in FP8:
            tiles[name] = tile
        elif note is not None and name in note.tiles:
            tiles[name] = tuple(note.tiles[name])
        else:
            continue
        wanted = scales_shape(tensor.shape, tiles[name]) if len(tensor.shape) > 1 else None
        found = None if scales is None else scales.shape
        if wanted is None or found != wanted:
            faults.append(f"{name} {list(tensor.shape)} in tiles {tiles[name]} with scales {found}")
    if faults:
        raise ValueError(f"scales do not fit their tensors: {'; '.join(faults)}")
    return tiles


def _named(
    stored: dict[str, StoredTensor],
    notes: dict[Path, Note | None],
    tiles: dict[str, tuple[int, int]],
    name: Callable[[str], str] | None,
) -> list[tuple[str, str]]:
    """The leaf of every tensor that is not the scales of another one."""
    scales = {f"{tensor}{SCALE_SUFFIX}" for tensor in tiles}
    found = []
    for tensor in stored:
        note = notes[stored[tensor].file] or Note()
        leaf = name(tensor) if name is not None else note.leaves.get(tensor, undotted(tensor))
        if tensor not in scales:
            found.append((leaf, tensor))
    return found


def _check_tree(path: Path, names: list[str]) -> None:
    """Raises a ValueError if leaves of these names are no tree."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    above = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    both = above.intersection(names)
    if twice or both:
        told = [f"{n} would be several leaves" for n in sorted(twice)]
        told += [f"{n} would be a leaf and have others below it" for n in sorted(both)]
        raise ValueError(f"{path}: {'; '.join(told)}: give names")
