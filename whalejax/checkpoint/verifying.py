"""Verifying a checkpoint, and mending what a single flipped bit made of it.

A CRC32C tells which bit it would be, but a worse fault can look like one: by chance 6 % of those
in 32 MiB do. So a file is mended only if XXH3, which knows nothing of CRC32C, then agrees.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from whalejax.checkpoint.faults import DamagedError, Fault, Flip
from whalejax.checkpoint.flips import flip_back, mend_seal, only_difference, turn
from whalejax.checkpoint.layout import ArrayLayout, Index, extent_file, zarr_file, zarr_json
from whalejax.checkpoint.manifest import MANIFEST, Manifest, decode
from whalejax.checkpoint.reading import scratch_buffer
from whalejax.checkpoint.threads import run_all
from whalejax.storage import Digest, Place, Running

BROKEN = ".broken"  # follows the name of a file where its broken copy is kept


class Report(NamedTuple):
    """What `verify` found.

    Attributes:
      nbytes: of the extents that the manifest names; 0 if it is beyond reading.
      faults: all that were found.
      mended: those of them that were mended; the broken file is kept as `FILE.broken`.
    """

    nbytes: int
    faults: tuple[Fault, ...]
    mended: tuple[Fault, ...]

    @property
    def damaged(self) -> tuple[Fault, ...]:
        """Faults that are still there."""
        return tuple(fault for fault in self.faults if fault not in self.mended)


class Finding(NamedTuple):
    """A fault, with what the file holds, and what it held if that is certain."""

    fault: Fault
    broken: bytes | None = None
    mended: bytes | None = None


def verify(
    place: Place,
    folder: str,
    *,
    repair: bool = False,
    progressed: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Reads all of a checkpoint, many files at once, in a buffer of an extent for each thread.

    Args:
      place: that holds it.
      folder: of it.
      repair: mend what can be mended with certainty. The broken file is kept beside it, durable
        before the mended one takes its place at once; an older broken copy of it is replaced.
      progressed: called, by one thread at a time, with the bytes of each extent that was read, and
        with 0 for the metadata of each array.

    Raises:
      FileNotFoundError: there is no manifest, or no more.
      ValueError: the manifest is of a later version.
      OSError: the place failed; a file that a disk cannot read (EIO) is a fault instead.
    """

    def settle(finding: Finding) -> tuple[Fault, bool]:
        return finding.fault, repair and _mend(place, folder, finding)

    manifest, finding = find_manifest(place, folder)
    findings = [] if finding is None else [settle(finding)]
    if manifest is not None:
        findings += _verify_files(place, folder, manifest, settle, progressed)
    if findings and place.size(_below(folder, MANIFEST)) is None:
        raise FileNotFoundError(f"{place.url}/{folder} was deleted while it was verified")
    return Report(
        nbytes=0 if manifest is None else manifest.nbytes,
        faults=tuple(fault for fault, _ in findings),
        mended=tuple(fault for fault, mended in findings if mended),
    )


def find_manifest(place: Place, folder: str) -> tuple[Manifest | None, Finding | None]:
    """A manifest, even if one bit of it is flipped, and what is wrong with it.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of a later version.
    """
    try:
        data = place.get(_below(folder, MANIFEST))
    except FileNotFoundError:
        raise
    except OSError as error:
        return None, Finding(Fault(MANIFEST, _unreadable(error)))
    try:
        return decode(data, MANIFEST), None
    except DamagedError as error:
        (fault,) = error.faults
    if (mended := mend_seal(data)) is None:
        return None, Finding(fault)
    whole, flip = mended
    return decode(whole, MANIFEST), Finding(fault._replace(flip=flip), data, whole)


def _verify_files(
    place: Place,
    folder: str,
    manifest: Manifest,
    settle: Callable[[Finding], tuple[Fault, bool]],
    progressed: Callable[[int], None],
) -> list[tuple[Fault, bool]]:
    """The faults of all files that a manifest names, settled by the thread that found them."""

    checks, settled = list(_checks(place, folder, manifest)), {}

    def run(number: int) -> tuple[int, tuple[Fault, bool] | None]:
        finding = checks[number].call()
        return number, None if finding is None else settle(finding)

    def done(found: tuple[int, tuple[Fault, bool] | None]) -> None:
        number, fault = found
        progressed(checks[number].nbytes)
        if fault is not None:
            settled[number] = fault

    run_all([partial(run, number) for number in range(len(checks))], place.workers, done)
    return [settled[number] for number in sorted(settled)]


class Check(NamedTuple):
    """What says whether a file is as it was written, and the bytes of the extent it holds."""

    nbytes: int
    call: Callable[[], Finding | None]


def _checks(place: Place, folder: str, manifest: Manifest) -> Iterator[Check]:
    """One for every file that a manifest names."""
    scratch = threading.local()
    for name, array in manifest.arrays.items():
        layout = array.layout
        yield Check(0, partial(_check_zarr_json, place, folder, name, layout))
        for index, wanted in zip(layout.indices(), array.digests, strict=True):
            call = partial(_check_extent, place, folder, name, layout, index, wanted, scratch)
            yield Check(layout.extent_bytes, call)


def _check_zarr_json(place: Place, folder: str, name: str, layout: ArrayLayout) -> Finding | None:
    """What is wrong with the metadata for other programs; the layout alone says what they were."""
    file, written = zarr_file(name), zarr_json(layout)
    try:
        data = place.get(_below(folder, file))
    except OSError as error:
        return Finding(Fault(file, _unreadable(error), name), None, written)
    if data == written:
        return None
    flip = only_difference(data, written)
    return Finding(Fault(file, "is not what the manifest says", name, None, flip), data, written)


def _check_extent(
    place: Place,
    folder: str,
    name: str,
    layout: ArrayLayout,
    index: Index,
    wanted: Digest,
    scratch: threading.local,
) -> Finding | None:
    file, running = extent_file(name, index), Running()
    buffer = scratch_buffer(scratch, layout.extent_bytes)
    try:
        place.read(_below(folder, file), memoryview(buffer), running)
    except OSError as error:
        return Finding(Fault(file, _unreadable(error), name, index))
    except ValueError as error:  # longer or shorter
        return Finding(Fault(file, str(error), name, index))
    found = running.digest()
    if found == wanted:
        return None
    flip = flip_back(buffer, found, wanted)
    if flip is None:
        what = f"{_compared(found, wanted)}; no single flipped bit explains it"
        return Finding(Fault(file, what, name, index))
    fault = Fault(file, _compared(found, wanted), name, index, flip)
    if not flip.confirmed:
        return Finding(fault)
    mended = buffer.tobytes()
    turn(buffer, 8 * flip.byte + flip.bit)
    fault = fault._replace(flip=_with_element(flip, layout, index, mended))
    return Finding(fault, buffer.tobytes(), mended)


def _with_element(flip: Flip, layout: ArrayLayout, index: Index, mended: bytes) -> Flip:
    """Adds the element that a bit lies in, unless it lies in what fills the extent up."""
    itemsize = layout.dtype.itemsize
    number, byte = divmod(flip.byte, itemsize)
    inside = np.unravel_index(number, layout.chunk) if layout.chunk else ()
    element = tuple(
        int(i * size + k) for i, size, k in zip(index, layout.chunk, inside, strict=True)
    )
    if any(k >= length for k, length in zip(element, layout.shape, strict=True)):
        return flip
    written = np.frombuffer(mended, np.uint8)[number * itemsize :][:itemsize]
    read = written.copy()
    turn(read, 8 * byte + flip.bit)
    written, read = written.view(layout.dtype)[0], read.view(layout.dtype)[0]
    return flip._replace(element=element, written=written, read=read)


def _mend(place: Place, folder: str, finding: Finding) -> bool:
    """Puts a file back as it was, if that is certain.

    If a running job deleted the checkpoint meanwhile, a file of it must not stand there again.
    """
    if finding.mended is None or place.size(_below(folder, MANIFEST)) is None:
        return False
    file = _below(folder, finding.fault.file)
    if finding.broken is not None:
        place.put(file + BROKEN, finding.broken)
    place.put(file, finding.mended)
    return True


def _compared(found: Digest, wanted: Digest) -> str:
    if found.crc32c != wanted.crc32c:
        return f"CRC32C {found.crc32c:08x} instead of {wanted.crc32c:08x}"
    return f"XXH3 {found.xxh3:016x} instead of {wanted.xxh3:016x}, although CRC32C is right"


def _unreadable(error: OSError) -> str:
    """Why one file cannot be read; raises the error if the place as a whole has failed."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno == errno.EIO:
        return f"cannot be read: {error.strerror}"
    raise error


def _below(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file
