"""Folders of a file system: POSIX calls in threads, many files at once.

Linux lets one writer at a time into a file, and a FUSE mount asks for 1 MiB at a time, so speed
comes from many files. Reading straight into the buffer of who asks, checksums included, takes no
more of the CPU than TensorStore's file driver without them, which reads into memory of its own
first (measured by `whalejax bench storage`).
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from whalejax.storage import threefs
from whalejax.storage.checksums import PIECE, Digest, Running, pieces
from whalejax.storage.mounts import listed

# of a file system that has nothing to do for a folder's fsync, or does not know it
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

GOT_AT_ONCE = 2**16  # bytes of a small file, for which room is made before they are read


class Files:
    """A `Place` in a file system.

    Args:
      root: the folder; made when something is written.
      mount: the 3FS mount on which it lies, if any.
    """

    renames = True

    def __init__(self, root: Path | str, *, mount: threefs.Mount | None = None):
        self.root = Path(root).absolute()
        self.mount = mount
        self.kind = "disk" if mount is None else "3fs"
        self.url = str(self.root)
        self.workers = max(4, min(16, os.cpu_count() or 1))

    def size(self, name: str) -> int | None:
        """As `Place.size`."""
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, buffer: memoryview, running: Running | None = None) -> None:
        """As `Place.read`."""
        with _opened(self.root / name, os.O_RDONLY) as file:
            if (size := os.fstat(file).st_size) != len(buffer):
                raise ValueError(f"{self.root / name} has {size} bytes instead of {len(buffer)}")
            for piece in pieces(buffer):
                _fill(file, piece, self.root / name)
                if running is not None:
                    running.update(piece)

    def write(
        self, name: str, buffers: Sequence[memoryview], running: Running | None = None
    ) -> None:
        """As `Place.write`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            for buffer in buffers:
                for piece in pieces(buffer):
                    if running is not None:
                        running.update(piece)
                    _drain(file, piece)
            os.fsync(file)

    def holds(self, name: str, nbytes: int, digest: Digest) -> bool:
        """As `Place.holds`."""
        if self.size(name) != nbytes:
            return False
        running, scratch = Running(), memoryview(bytearray(min(PIECE, nbytes)))
        with _opened(self.root / name, os.O_RDWR) as file:
            for start in range(0, nbytes, PIECE):
                piece = scratch[: nbytes - start]
                _fill(file, piece, self.root / name)
                running.update(piece)
            os.fsync(file)
        return running.digest() == digest

    def get(self, name: str) -> bytes:
        """As `Place.get`."""
        with _opened(self.root / name, os.O_RDONLY) as file:
            return b"".join(iter(lambda: os.read(file, GOT_AT_ONCE), b""))

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """As `Place.put`: written beside its place, synchronised, renamed."""
        path = self.root / name
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # hosts share process ids
        try:
            self.write(str(beside.relative_to(self.root)), [memoryview(data)])
            if exclusive:
                os.link(beside, path)  # as rename, but fails if the target exists
            else:
                os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)

    def names(self, folder: str) -> list[str]:
        """As `Place.names`."""
        found = (
            Path(parent, name).relative_to(self.root).as_posix()
            for parent, _, names in _walk(self.root / folder)
            for name in names
        )
        return sorted(found)

    def folders(self, folder: str) -> list[str]:
        """As `Place.folders`."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir() if path.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def rename(self, source: str, target: str) -> None:
        """As `Place.rename`.

        A client that lost its answer cannot tell whether the rename happened: where the target
        stands and the source is gone, it did (3FS renames in a transaction). Listings say so; what
        `stat` says then may be old.
        """
        before, after = self.root / source, self.root / target
        if after.is_dir() and any(after.iterdir()):
            raise FileExistsError(errno.EEXIST, "exists already", str(after))
        try:
            os.rename(before, after)
        except OSError:
            if listed(before) or not listed(after):
                raise
        sync_folder(after.parent)

    def remove(self, name: str) -> None:
        """As `Place.remove`."""
        (self.root / name).unlink(missing_ok=True)

    def remove_tree(self, folder: str) -> None:
        """As `Place.remove_tree`; on 3FS the servers do it (`threefs.remove_tree`)."""
        path = self.root / folder
        if self.mount is not None:
            threefs.remove_tree(self.mount, path)
        elif path.exists():
            shutil.rmtree(path)

    def sync(self, folder: str) -> None:
        """As `Place.sync`."""
        for parent, _, _ in _walk(self.root / folder):
            sync_folder(Path(parent))
        sync_folder((self.root / folder).parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where its file system has something to do for it."""
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as folder:
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor; errors of what is done with it name the path."""
    file = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield file
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(file)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, bottom up; of its errors only a folder that is not there is none."""

    def check(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(folder, topdown=False, onerror=check)


def _fill(file: int, piece: memoryview, path: Path) -> None:
    while len(piece):
        count = os.readv(file, [piece])
        if not count:
            raise ValueError(f"{path} became shorter while it was read: {len(piece)} bytes missing")
        piece = piece[count:]


def _drain(file: int, piece: memoryview) -> None:
    while len(piece):
        piece = piece[os.write(file, piece) :]
