"""Reading a checkpoint: each process the extents that its devices' parts touch, each of them once.

An extent is read into the array that wants it where it fits as it lies, else into a buffer of the
reading thread and copied from there. Its CRC32C is computed piece by piece as it comes; nothing of
an extent that is damaged reaches an array that is returned.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from whalejax.checkpoint.faults import DamagedError, Fault
from whalejax.checkpoint.layout import Box, Index, extent_file, lengths, overlap, within
from whalejax.checkpoint.manifest import StoredArray
from whalejax.checkpoint.threads import run_all
from whalejax.storage import Place, Running
from whalejax.storage.memory import host_array


class Part(NamedTuple):
    """A box of an array, and the host memory that it goes to, of the box's shape."""

    box: Box
    memory: np.ndarray


class _Read(NamedTuple):
    """An extent, and the parts that it touches."""

    name: str
    array: StoredArray
    index: Index
    parts: list[Part]


def read_parts(
    place: Place,
    folder: str,
    wanted: dict[str, tuple[StoredArray, list[Part]]],
    *,
    verify: bool = True,
    progressed: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Fills parts of arrays, many extents at once.

    Args:
      place: that holds the checkpoint.
      folder: of it.
      wanted: stored arrays by name, each with its parts; where a part's dtype is another than the
        array's, its elements are converted.
      verify: compare each extent's CRC32C.
      progressed: called, by one thread at a time, with the bytes of each extent that was read.

    Raises:
      DamagedError: extents are damaged or missing; names all of them. The parts' content is then
        not to be used.
      OSError: the place failed.
    """
    reads = [
        _Read(name, array, index, touched)
        for name, (array, parts) in wanted.items()
        for index, touched in _touched(array, parts).items()
    ]
    scratch, faults = threading.local(), {}

    def done(read: tuple[int, Fault | None]) -> None:
        number, fault = read
        progressed(reads[number].array.layout.extent_bytes)
        if fault is not None:
            faults[number] = fault

    def read(number: int) -> tuple[int, Fault | None]:
        return number, _read(place, folder, reads[number], scratch, verify=verify)

    run_all([partial(read, number) for number in range(len(reads))], place.workers, done)
    if faults:
        raise DamagedError([faults[number] for number in sorted(faults)])


def _touched(array: StoredArray, parts: Sequence[Part]) -> dict[Index, list[Part]]:
    found: dict[Index, list[Part]] = {}
    for part in parts:
        for index in array.layout.touching(part.box):
            found.setdefault(index, []).append(part)
    return found


def _read(
    place: Place, folder: str, one: _Read, scratch: threading.local, *, verify: bool
) -> Fault | None:
    layout, file = one.array.layout, extent_file(one.name, one.index)
    running = Running(xxh3=False) if verify else None
    direct = _direct(one)
    buffer = direct if direct is not None else scratch_buffer(scratch, layout.extent_bytes)
    try:
        place.read(f"{folder}/{file}" if folder else file, memoryview(buffer), running)
    except FileNotFoundError:
        return Fault(file, "is missing", one.name, one.index)
    except ValueError as error:  # longer or shorter
        return Fault(file, str(error), one.name, one.index)
    if running is not None:
        expected = one.array.digests[_number(one)].crc32c
        if running.crc32c != expected:
            what = f"CRC32C {running.crc32c:08x} instead of {expected:08x}"
            return Fault(file, what, one.name, one.index)
    if direct is None:
        _hand_out(one, buffer)
    return None


def _direct(one: _Read) -> np.ndarray | None:
    """`u8[n]` of the one part that an extent fits into as it lies; None if there is none."""
    layout, (part, *others) = one.array.layout, one.parts
    box = layout.box(one.index)
    if others or part.memory.dtype != layout.dtype or lengths(box) != layout.chunk:
        return None
    if overlap(box, part.box) != box:
        return None
    inside = part.memory[(*within(box, part.box), ...)]  # a view, of no axes too
    return inside.reshape(-1).view(np.uint8) if inside.flags.c_contiguous else None


def _hand_out(one: _Read, buffer: np.ndarray) -> None:
    layout = one.array.layout
    box = layout.box(one.index)
    whole = tuple((start, start + size) for (start, _), size in zip(box, layout.chunk, strict=True))
    chunk = buffer.view(layout.dtype).reshape(layout.chunk)
    for part in one.parts:
        shared = overlap(box, part.box)
        source = chunk[within(shared, whole)]
        part.memory[within(shared, part.box)] = source.astype(part.memory.dtype, copy=False)


def scratch_buffer(scratch: threading.local, nbytes: int) -> np.ndarray:
    """`u8[nbytes]` that a thread uses for one extent after the other."""
    if getattr(scratch, "room", None) is None or scratch.room.nbytes < nbytes:
        scratch.room = host_array((nbytes,), np.uint8)
    return scratch.room[:nbytes]


def _number(one: _Read) -> int:
    """An extent's place among its array's digests."""
    return int(np.ravel_multi_index(one.index, one.array.layout.grid)) if one.index else 0
