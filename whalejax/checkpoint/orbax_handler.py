"""Our checkpoints as items of Orbax's CheckpointManager, which keeps, chooses and deletes them.

    manager = ocp.CheckpointManager(path, options=…, item_handlers=WhaleHandler())
    manager.save(step, args=WhaleSave(tree), metrics=…)
    tree = manager.restore(step, args=WhaleRestore(like))

An item's folder holds what the folder of a step of `CheckpointStore` does. Orbax writes it beside
its place, waits for all processes and renames it; the manifest with its checksums is ours.
"""

import dataclasses
import threading
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from whalejax import storage
from whalejax.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredArray,
    copy_metadata,
    decode,
)
from whalejax.checkpoint.planning import EXTENT_BYTES, Plan, make_plan
from whalejax.checkpoint.processes import TIMEOUT_S, Meeting
from whalejax.checkpoint.restoring import restore_like, restore_nested
from whalejax.checkpoint.saving import save
from whalejax.checkpoint.snapshot import Snapshot, take_snapshot
from whalejax.checkpoint.tree import nested, take_apart
from whalejax.checkpoint.writing import Target
from whalejax.storage.memory import Arena


class ItemMetadata(NamedTuple):
    """What an item consists of.

    Attributes:
      tree: nested dicts of abstract arrays, numbers and strings.
      metadata: what `WhaleSave` was given.
    """

    tree: Any
    metadata: Any


class WhaleHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores trees as extents under a manifest with checksums.

    All processes of the job take part, the first one being Orbax's primary host, over storage that
    they share. An asynchronous save copies the tree on the host first; the memory for that is kept
    for the next one.

    Args:
      extent_bytes: about how large files shall be.
      timeout_s: without a sign of life, after which a process of the job counts as missing.

    Raises:
      ValueError: one of them is not positive.
    """

    def __init__(self, *, extent_bytes: int = EXTENT_BYTES, timeout_s: float = TIMEOUT_S):
        if extent_bytes < 1 or timeout_s <= 0:
            raise ValueError(f"extent_bytes={extent_bytes}, timeout_s={timeout_s} must be positive")
        self.extent_bytes, self.timeout_s = extent_bytes, timeout_s
        self._arenas: list[Arena] = []  # that no save uses; one handler may serve several items
        self._lock = threading.Lock()

    async def async_save(self, directory: PurePath, args: "WhaleSave") -> list[ocp.future.Future]:
        """Copies the tree on the host, and begins to write it; for Orbax to call."""
        plan, meeting, target = self._prepared(directory, args)
        with self._lock:
            arena = self._arenas.pop() if self._arenas else Arena()
        with meeting.attended():
            snapshot = take_snapshot(plan, meeting.process, arena)

        async def write() -> None:
            try:
                self._save(target, plan, snapshot, meeting, args)
            finally:
                with self._lock:
                    self._arenas.append(arena)

        # begins when Orbax has made the folder, which it does beside
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name=meeting.title)]

    def save(self, directory: PurePath, args: "WhaleSave") -> None:
        """Saves, and returns when all is written; for Orbax to call."""
        plan, meeting, target = self._prepared(directory, args)
        self._save(target, plan, take_snapshot(plan, meeting.process, None), meeting, args)

    def restore(self, directory: PurePath, args: "WhaleRestore | None" = None) -> Any:
        """Restores what the arguments name, all by default; for Orbax to call.

        Raises:
          FileNotFoundError: the folder holds no checkpoint of ours.
          ValueError: the arguments' `item` does not fit what is stored; lists all.
          DamagedError: something is damaged; names it.
        """
        args = WhaleRestore() if args is None else args
        place, manifest = read_manifest(directory)
        if args.item is None:
            return restore_nested(place, "", manifest, verify=args.verify)
        return restore_like(place, "", manifest, args.item, verify=args.verify)

    def metadata(self, directory: PurePath) -> ItemMetadata:
        """What the item consists of."""
        manifest = read_manifest(directory)[1]
        arrays = {name: _abstract(stored) for name, stored in manifest.arrays.items()}
        tree = nested(arrays | manifest.values, manifest.quantized)
        return ItemMetadata(tree, manifest.metadata)

    def _prepared(self, directory: PurePath, args: "WhaleSave") -> tuple[Plan, Meeting, Target]:
        plan = make_plan(args.item, extent_bytes=self.extent_bytes)
        meeting = Meeting(f"saving {directory}", self.timeout_s)
        return plan, meeting, Target(storage.open(str(directory)), "", committed_elsewhere=True)

    def _save(
        self, target: Target, plan: Plan, snapshot: Snapshot, meeting: Meeting, args: "WhaleSave"
    ) -> None:
        save(target, plan, snapshot, meeting, step=args.step, metadata=args.metadata)


@ocp.args.register_with_handler(WhaleHandler, for_save=True)
@dataclasses.dataclass
class WhaleSave(ocp.args.CheckpointArgs):
    """What to save as an item.

    Attributes:
      item: a tree as `CheckpointStore.save` takes it.
      metadata: JSON to keep in the item's manifest.
      step: for the manifest; Orbax tells an item's handler none, and knows it itself.

    Raises:
      TypeError: a leaf cannot be stored.
      ValueError: two leaves get one name, or the metadata is no JSON.
    """

    item: Any
    metadata: Any = None
    step: int | None = None

    def __post_init__(self):
        # here, as of an error in a handler's `async_save` Orbax leaves a thread that waits minutes
        self.metadata = copy_metadata(self.metadata)
        take_apart(self.item)


@ocp.args.register_with_handler(WhaleHandler, for_restore=True)
@dataclasses.dataclass
class WhaleRestore(ocp.args.CheckpointArgs):
    """What to restore of an item.

    Attributes:
      item: as `like` of `CheckpointStore.restore`: a tree whose dtypes and shardings count, or None
        for all as nested dicts of NumPy arrays.
      verify: False to compare no checksums.
    """

    item: Any = None
    verify: bool = True


def read_manifest(directory: PurePath | str) -> tuple[storage.Place, Manifest]:
    """The place of an item's folder, and the manifest that lies there.

    Raises:
      FileNotFoundError: there is none.
      DamagedError: it is damaged.
    """
    place = storage.open(str(directory))
    try:
        return place, decode(place.get(MANIFEST), MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"{place.url} has no {MANIFEST}: it is no item of ours") from None


def _abstract(stored: StoredArray) -> jax.ShapeDtypeStruct:
    layout = stored.layout
    if layout.key is None:
        return jax.ShapeDtypeStruct(layout.shape, layout.dtype)
    dtype = jax.eval_shape(lambda: jax.random.key(0, impl=layout.key)).dtype
    return jax.ShapeDtypeStruct(layout.shape[:-1], dtype)
