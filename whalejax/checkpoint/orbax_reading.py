"""Reading what Orbax wrote, by Orbax's own reader: OCDBT or a file each, zarr2 or zarr3.

Orbax keeps no checksums: it notices a file that was cut off, and restores flipped bits in silence.
Import a checkpoint once, and what was read then is guarded from there on.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from whalejax import storage
from whalejax.checkpoint.layout import ArrayLayout
from whalejax.checkpoint.manifest import MANIFEST, Manifest, StoredArray
from whalejax.checkpoint.orbax_folders import TREE_FILE, orbax_steps
from whalejax.checkpoint.orbax_handler import WhaleHandler, WhaleRestore
from whalejax.checkpoint.restoring import check
from whalejax.checkpoint.store import CheckpointStore
from whalejax.checkpoint.tree import is_key, named
from whalejax.storage import Place


def read_orbax(
    path: Path | str, step: int | None = None, like: Any = None, *, item: str | None = None
) -> Any:
    """Restores a tree that Orbax saved, by StandardSave, PyTreeSave or our WhaleSave.

    All processes of a job call it. Only items of WhaleSave have checksums, which are compared.

    Args:
      path: the folder of a run, of one of its steps, of an item, or of a tree saved alone; or its
        URL, if Orbax knows it, too.
      step: of a run; None for its newest.
      like: a tree of arrays, concrete or abstract, as for `CheckpointStore.restore`: what it names
        is restored, in its dtypes and shardings; its NumPy arrays are filled in place. None for
        all: dicts and lists of NumPy arrays, PRNG keys, numbers and strings.
      item: which of a step; None for its only tree.

    Returns:
      The tree.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: several items are trees and none was named, or `like` does not fit what is stored;
        lists all.
    """
    folder = find_item(path, step, item)
    if storage.open(folder).size(MANIFEST) is not None:
        return WhaleHandler().restore(folder, WhaleRestore(like))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        if like is None:
            return _read_all(checkpointer, folder, stored)
        return _read_like(checkpointer, folder, stored, like)


def import_orbax(
    path: Path | str,
    store: CheckpointStore,
    step: int | None = None,
    like: Any = None,
    *,
    item: str | None = None,
    metadata: Any = None,
) -> int:
    """Saves a step that Orbax wrote as the same step of a store, complete when this returns.

    The host holds the whole tree meanwhile, unless `like` spreads it over devices.

    Args:
      path: the folder of a run; the store lies in another one.
      store: where to.
      step, like, item: as `read_orbax`.
      metadata: JSON to keep with it.

    Returns:
      The step.

    Raises:
      FileNotFoundError, ValueError: as `read_orbax`, or the store holds the step already; nothing
        was written.
      OSError: the checkpoint could not be written.
    """
    place = storage.open(path)
    step, _ = _find_step(place, step)
    if place.url == store.place.url:
        raise ValueError(f"{place.url} holds the step {step} of Orbax: give a store elsewhere")
    if step in store.steps():
        raise ValueError(f"{store.place.url} holds a checkpoint of step {step} already")
    store.save(step, read_orbax(path, step, like, item=item), metadata=metadata, block=True)
    return step


def find_item(path: Path | str, step: int | None = None, item: str | None = None) -> str:
    """The folder, or URL, of a tree that Orbax saved; arguments and errors as `read_orbax`."""
    place = storage.open(path)
    a_run = step is not None or orbax_steps(place)
    folder = f"{_find_step(place, step)[1]}/" if a_run else ""
    if item is None and _is_tree(place, folder):
        return f"{place.url}/{folder}".rstrip("/")
    items = _trees(place, folder)
    if item is None and len(items) > 1:
        raise ValueError(f"{place.url}/{folder} holds {', '.join(items)}: name the item")
    if not items or item not in (None, *items):
        there = ", ".join(items) or "none"
        raise FileNotFoundError(
            f"{place.url}/{folder} has no {item or 'item'} that is a tree; its trees: {there}"
        )
    return f"{place.url}/{folder}{item or items[0]}"


def _find_step(place: Place, step: int | None) -> tuple[int, str]:
    steps = orbax_steps(place)
    if not steps or step not in (None, *steps):
        what = "checkpoint" if step is None else f"step {step}"
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{place.url} has no {what} of Orbax; its steps: {there}")
    step = max(steps) if step is None else step
    return step, steps[step]


def _is_tree(place: Place, folder: str) -> bool:
    return any(place.size(f"{folder}{file}") is not None for file in (TREE_FILE, MANIFEST))


def _trees(place: Place, folder: str) -> list[str]:
    return [name for name in place.folders(folder) if _is_tree(place, f"{folder}{name}/")]


def _read_all(checkpointer: ocp.Checkpointer, folder: str, stored: Any) -> Any:
    """All leaves on the host: PRNG keys, which lie there as uint32, as such; others by NumPy, as
    JAX might not have their dtypes (float64)."""
    on_host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def wanted(leaf: Any) -> ocp.RestoreArgs:
        if not _is_array(leaf):
            return ocp.RestoreArgs()
        if leaf.dtype == np.uint32:
            return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=on_host)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(wanted, stored, is_leaf=_is_metadata))
    tree = checkpointer.restore(folder, args=args)
    return jax.tree.map(
        lambda x: np.asarray(x) if isinstance(x, jax.Array) and not is_key(x) else x, tree
    )


def _read_like(checkpointer: ocp.Checkpointer, folder: str, stored: Any, like: Any) -> Any:
    """The leaves that `like` names, which are asked for in the structure that Orbax stored: it
    holds lists of another length against a subtree, and leaves out in silence what it lacks."""
    wanted, leaves = dict(named(like)), named(stored, is_leaf=_is_metadata)
    check(_as_manifest(dict(leaves), wanted), wanted, {})
    abstract = [_placed(wanted[n]) if n in wanted else ocp.PLACEHOLDER for n, _ in leaves]
    item = jax.tree.unflatten(jax.tree.structure(stored, is_leaf=_is_metadata), abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    restored = checkpointer.restore(
        folder, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments)
    )
    found = dict(zip((n for n, _ in leaves), jax.tree.leaves(restored), strict=True))
    return jax.tree.unflatten(
        jax.tree.structure(like), [_handed_over(n, x, found[n]) for n, x in wanted.items()]
    )


def _handed_over(name: str, target: Any, leaf: Any) -> Any:
    """A leaf that was read, in the memory of its target if that is a NumPy array."""
    if is_key(target) != is_key(leaf):
        what = "no PRNG keys" if is_key(target) else "an array of PRNG keys"
        raise ValueError(f"{name} cannot be restored so: it is {what}")
    if not isinstance(target, np.ndarray):
        return leaf
    target[...] = leaf
    return target


def _placed(leaf: Any) -> Any:
    """A leaf of `like` with a sharding: without one Orbax would want that of the devices then."""
    if not hasattr(leaf, "shape") or isinstance(leaf, np.ndarray | np.generic):
        return leaf
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_manifest(stored: dict[str, Any], wanted: dict[str, Any]) -> Manifest:
    """What Orbax stored, as a manifest to check `wanted` by; keys only show when they are read."""
    arrays, values = {}, {}
    for name, leaf in stored.items():
        if not _is_array(leaf):
            values[name] = leaf
            continue
        key = str(jax.random.key_impl(wanted[name])) if is_key(wanted.get(name)) else None
        layout = ArrayLayout(tuple(leaf.shape), np.dtype(leaf.dtype), tuple(leaf.shape), key)
        arrays[name] = StoredArray(layout, ())
    return Manifest(step=None, created="", arrays=arrays, values=values)


def _is_metadata(node: Any) -> bool:
    return isinstance(node, ocp.metadata.Metadata)


def _is_array(leaf: Any) -> bool:
    scalar = isinstance(leaf, ocp.metadata.ScalarMetadata)  # which Orbax counts among arrays
    return isinstance(leaf, ocp.metadata.ArrayMetadata) and not scalar
