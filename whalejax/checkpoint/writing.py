"""Writing a checkpoint: extents, what names them, and the commit that makes it one.

Where folders can be renamed, a step is written beside its place, in `STEP.saving`, and renamed.
Elsewhere its manifest, written last and only if there is none, is the commit. Killed at any moment,
a save leaves the last complete step as it was. Saved again, it writes what is missing: a file that
was left over is kept if its digest is that of the new bytes.
"""

import datetime
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from whalejax.checkpoint.layout import extent_file, zarr_file, zarr_json
from whalejax.checkpoint.manifest import MANIFEST, Manifest, StoredArray, seal, unseal
from whalejax.checkpoint.planning import Extent, Plan
from whalejax.checkpoint.snapshot import Snapshot
from whalejax.checkpoint.threads import run_all
from whalejax.storage import Digest, Place, Running, digest

SAVING, DELETING = ".saving", ".deleting"
Digests = dict[Extent, Digest]


class Target(NamedTuple):
    """Where a checkpoint is written.

    Attributes:
      place: that holds it.
      folder: of it, once it is complete.
      committed_elsewhere: the folder is renamed by who asked for it (Orbax does).
    """

    place: Place
    folder: str
    committed_elsewhere: bool = False

    @property
    def writing(self) -> str:
        """The folder while it is written."""
        beside = self.place.renames and not self.committed_elsewhere
        return f"{self.folder}{SAVING}" if beside else self.folder

    def file(self, name: str) -> str:
        """A file's name, in the place, while the checkpoint is written."""
        return f"{self.writing}/{name}" if self.writing else name


def write_extents(
    target: Target,
    snapshot: Snapshot,
    arrays: Iterable[tuple[str, bytes]],
    progressed: Callable[[int], None] = lambda nbytes: None,
) -> Digests:
    """Writes a process's extents, and files of zarr3 metadata, many at once.

    Args:
      target: where to.
      snapshot: the extents.
      arrays: names of arrays whose metadata this process writes, with its bytes.
      progressed: called with the bytes of each file that stands.

    Returns:
      The digests of the extents.

    Raises:
      OSError: of the first file that could not be written; no other is begun after it.
    """
    arrays, left_over = list(arrays), set(target.place.names(target.writing))
    files = [extent_file(extent.array, extent.index) for extent in snapshot.extents]
    files += [zarr_file(name) for name, _ in arrays]
    _make_way(target.place, {target.file(file) for file in files}, left_over)
    digests: Digests = {}

    def write_extent(extent: Extent) -> int:
        buffers = snapshot.extents[extent]
        file = target.file(extent_file(extent.array, extent.index))
        digests[extent] = _write(target.place, file, buffers, left_over)
        return sum(buffer.nbytes for buffer in buffers)

    def write_metadata(name: str, data: bytes) -> int:
        _write(target.place, target.file(zarr_file(name)), [memoryview(data)], left_over)
        return len(data)

    calls = [partial(write_extent, extent) for extent in snapshot.extents]
    calls += [partial(write_metadata, *array) for array in arrays]
    run_all(calls, target.place.workers, progressed)
    return digests


def _make_way(place: Place, files: set[str], left_over: set[str]) -> None:
    """Deletes what a save of another tree left where a folder must be a file, or a file a folder.

    An array without axes is the file `c`, one with axes a folder of this name.
    """
    strays = left_over - files
    folders = {folder for file in files for folder in _folders(file)} if strays else set()
    for name in strays & folders:
        place.remove(name)
    for folder in {folder for name in strays for folder in _folders(name)} & files:
        place.remove_tree(folder)


def _folders(file: str) -> list[str]:
    return [file[:end] for end, letter in enumerate(file) if letter == "/"]


def _write(place: Place, file: str, buffers: Iterable[memoryview], left_over: set[str]) -> Digest:
    if file in left_over:
        wanted = digest(*buffers)
        if place.holds(file, sum(buffer.nbytes for buffer in buffers), wanted):
            return wanted
    running = Running()
    place.write(file, list(buffers), running)
    return running.digest()


def make_manifest(plan: Plan, digests: Digests, *, step: int | None, metadata: Any) -> Manifest:
    """The manifest of a plan once all its extents are written."""
    by_array: dict[str, list[Digest]] = {name: [] for name in plan.layouts}
    for name, layout in plan.layouts.items():
        by_array[name] = [digests[Extent(name, index)] for index in layout.indices()]
    return Manifest(
        step=step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        arrays={
            name: StoredArray(layout, tuple(by_array[name]))
            for name, layout in plan.layouts.items()
        },
        values=plan.leaves.values,
        quantized=plan.leaves.quantized,
        metadata=metadata,
    )


def metadata_files(plan: Plan) -> list[tuple[str, bytes]]:
    """The name of every array, and the bytes of its zarr3 metadata."""
    return [(name, zarr_json(layout)) for name, layout in plan.layouts.items()]


def commit(target: Target, manifest: Manifest) -> None:
    """Makes what was written a checkpoint.

    Raises:
      FileExistsError: there is one already.
      OSError: the place failed; there is none of this step, or it is complete.
    """
    place, data = target.place, manifest.encode()
    known = {target.file(MANIFEST)}
    for name, array in manifest.arrays.items():
        known.add(target.file(zarr_file(name)))
        known |= {target.file(extent_file(name, index)) for index in array.layout.indices()}
    if not target.committed_elsewhere:  # else others may write into the folder, too
        for stray in set(place.names(target.writing)) - known:  # of a save with another mesh
            place.remove(stray)
    if not place.renames:
        place.put(target.file(MANIFEST), data, exclusive=True)
        return
    place.write(target.file(MANIFEST), [memoryview(data)])
    place.sync(target.writing)
    if not target.committed_elsewhere:
        place.rename(target.writing, target.folder)


def part_file(process: int) -> str:
    """Where a process tells the first one what it wrote; gone once the checkpoint stands."""
    return f"parts/{process}.json"


def write_part(target: Target, process: int, digests: Digests) -> None:
    """Writes down the digests of a process's extents."""
    rows = [[name, index, *found] for (name, index), found in digests.items()]
    target.place.put(target.file(part_file(process)), seal(rows))


def read_part(target: Target, process: int) -> Digests:
    """The digests that a process wrote down.

    Raises:
      FileNotFoundError: it did not.
      DamagedError: they are damaged.
    """
    file = target.file(part_file(process))
    rows = unseal(target.place.get(file), file)
    return {Extent(name, tuple(index)): Digest(crc32c, xxh3) for name, index, crc32c, xxh3 in rows}
