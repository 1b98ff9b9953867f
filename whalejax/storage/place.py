"""What all places have in common: named runs of bytes, some of them many megabytes long."""

from collections.abc import Sequence
from typing import Protocol

from whalejax.storage.checksums import Digest, Running


class Place(Protocol):
    """A folder of a file system, or a prefix of an object store.

    Names are relative, with slashes, without control characters, and no part of them is empty, `.`
    or `..`; what is called a folder here is a prefix there. No name is both a file and a folder,
    and `""` is the folder of all. Every method may be called by several threads at once, and blocks
    without the GIL. All raise `OSError`, with the name, when the place itself fails:
    `PermissionError` where it refuses, `TimeoutError` where it does not answer.

    Attributes:
      url: what `open` was given, made absolute.
      kind: `"disk"`, `"3fs"`, `"gcs"`, `"s3"` or `"memory"`.
      renames: a folder can be renamed as one transaction; without it a file that is written last,
        and only if it is not there, has to commit what was written before.
      workers: how many calls at once keep the place busy.
    """

    url: str
    kind: str
    renames: bool
    workers: int

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none of this name. An object store has to read it."""

    def read(self, name: str, buffer: memoryview, running: Running | None = None) -> None:
        """Fills `buffer` with a whole file, adding its bytes to `running` as they come.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is shorter or longer than the buffer.
        """

    def write(
        self, name: str, buffers: Sequence[memoryview], running: Running | None = None
    ) -> None:
        """Writes a file from buffers, one after the other; durable when it returns.

        What had this name before is replaced, and not at once: for files that a later commit names.
        """

    def holds(self, name: str, nbytes: int, digest: Digest) -> bool:
        """Whether a file has this many bytes and these checksums; if so, it is durable now."""

    def get(self, name: str) -> bytes:
        """A small file.

        Raises:
          FileNotFoundError: there is no such file.
        """

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Writes a small file at once: readers see all of it or what was there before.

        Raises:
          FileExistsError: `exclusive`, and it is there already. An object store, which may ask
            again when an answer was lost, takes an object of the very same bytes for its own.
        """

    def names(self, folder: str) -> list[str]:
        """All files below a folder, however deep, sorted; empty if there is no such folder."""

    def folders(self, folder: str) -> list[str]:
        """The last part of the names of folders right below a folder, sorted.

        An object store has no folders without files, and lists all files below to find them.
        """

    def rename(self, source: str, target: str) -> None:
        """Renames a folder, durably, if `renames`.

        Raises:
          FileExistsError: there is a folder `target` that holds anything.
        """

    def remove(self, name: str) -> None:
        """Deletes a file; none of this name is no error."""

    def remove_tree(self, folder: str) -> None:
        """Deletes a folder with all below it; none of this name is no error."""

    def sync(self, folder: str) -> None:
        """Makes the names of all files below a folder durable, as `write` does their bytes."""
