"""Objects of a bucket (Google Cloud Storage, S3 and its like), or of this process' memory.

TensorStore's key-value stores move the bytes, in threads of their own. An object appears whole or
not at all, and is durable when its put is answered; folders are only beginnings of names, so that
looking for them lists all that lies below.

A worker holds its object twice more while it moves: as the bytes that Python hands over or takes,
and as TensorStore's copy of them.
"""

import errno
import re
from collections.abc import Sequence
from typing import TypeVar

import tensorstore as ts

from whalejax.storage.checksums import Digest, Running, pieces
from whalejax.storage.checksums import digest as digest_of

T = TypeVar("T")

WORKERS = 32  # requests at once; as many as TensorStore allows by default
# Seconds until an operation fails that a server neither answers nor refuses; more for an object's
# bytes, at a rate that any link has: TensorStore itself waits for ever.
PATIENCE = 90
SLOWEST = 2**17  # bytes a second, of one of `WORKERS`
NO_VALUE = b"\x02"  # TensorStore's generation of an object that does not exist
ERRNO = {
    "NOT_FOUND": errno.ENOENT,  # the bucket; of an object the answer is no error
    "PERMISSION_DENIED": errno.EACCES,
    "UNAUTHENTICATED": errno.EACCES,
}


class Objects:
    """A `Place` in an object store.

    A put with `exclusive` is conditional on the server: S3 and Google Cloud Storage decide between
    writers; of a store that ignores `If-None-Match` only what it held a moment before is asked.
    A bucket that does not exist reads as if it held nothing, and Google's also lists so; all else
    that is asked of it is an error.

    Args:
      store: a key-value store, its path empty or ending with a slash.
      url: what it was made of; without what follows a question mark it begins names in errors.
      kind: `"gcs"`, `"s3"` or `"memory"`.
    """

    renames = False
    workers = WORKERS

    def __init__(self, store: ts.KvStore, url: str, kind: str):
        self.url = url
        self.kind = kind
        self._store = store
        self._base = url.partition("?")[0].rstrip("/")

    def size(self, name: str) -> int | None:
        """As `Place.size`; costs as much as reading it, as TensorStore tells no sizes."""
        data = self._find(name)
        return None if data is None else len(data)

    def read(self, name: str, buffer: memoryview, running: Running | None = None) -> None:
        """As `Place.read`."""
        data = memoryview(self._get(name, len(buffer)))
        if len(data) != len(buffer):
            raise ValueError(f"{self._url(name)} has {len(data)} bytes instead of {len(buffer)}")
        for target, piece in zip(pieces(buffer), pieces(data), strict=True):
            target[:] = piece
            if running is not None:
                running.update(target)

    def write(
        self, name: str, buffers: Sequence[memoryview], running: Running | None = None
    ) -> None:
        """As `Place.write`."""
        if running is not None:
            for buffer in buffers:
                for piece in pieces(buffer):
                    running.update(piece)
        self._write(name, b"".join(buffers))

    def holds(self, name: str, nbytes: int, digest: Digest) -> bool:
        """As `Place.holds`."""
        data = self._find(name, nbytes)
        return data is not None and len(data) == nbytes and digest_of(data) == digest

    def get(self, name: str) -> bytes:
        """As `Place.get`."""
        return self._get(name)

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """As `Place.put`."""
        if not exclusive:
            self._write(name, data)
            return
        failure = None
        try:
            if self._write(name, data, if_equal=NO_VALUE).generation:
                return
        except OSError as error:
            failure = error
        self._judge(name, data, failure)

    def names(self, folder: str) -> list[str]:
        """As `Place.names`."""
        return sorted(self._list(_below(folder), folder))

    def folders(self, folder: str) -> list[str]:
        """As `Place.folders`; lists all that lies below."""
        start = len(folder) + 1 if folder else 0
        below = (name[start:] for name in self._list(_below(folder), folder))
        return sorted({name.partition("/")[0] for name in below if "/" in name})

    def rename(self, source: str, target: str) -> None:
        """An object store renames nothing: see `Place.renames`.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.url} is an object store, which cannot rename {source!r} to {target!r}"
        )

    def remove(self, name: str) -> None:
        """As `Place.remove`."""
        self._await(self._store.write(_key(name), None), name)

    def remove_tree(self, folder: str) -> None:
        """As `Place.remove_tree`."""
        removals = [(name, self._store.write(name, None)) for name in self.names(folder)]
        for name, removal in removals:  # each with patience of its own, as there may be many
            self._await(removal, name)

    def sync(self, folder: str) -> None:
        """As `Place.sync`; a name is durable with its object."""

    def _find(self, name: str, count: int = 0) -> bytes | None:
        found = self._await(self._store.read(_key(name)), name, count)
        return found.value if found.state == "value" else None

    def _get(self, name: str, count: int = 0) -> bytes:
        data = self._find(name, count)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._url(name))
        return data

    def _write(
        self, name: str, data: bytes, if_equal: bytes | None = None
    ) -> ts.KvStore.TimestampedStorageGeneration:
        written = self._store.write(_key(name), data, if_equal=if_equal)
        return self._await(written, name, len(data))

    def _list(self, within: ts.KvStore.KeyRange, name: str) -> list[str]:
        keys = self._await(self._store.list(within), name)
        if self.kind == "gcs":
            # TensorStore 0.1.86 takes a page that Google refuses (400, 401, 403) for the last and
            # an empty one. A read it reports as refused, whether or not there is such an object.
            self._find(f"{name or 'all'}/listed")
        return [key.decode() for key in keys]

    def _judge(self, name: str, data: bytes, failure: OSError | None) -> None:
        """Whether a conditional put succeeded that was refused, or that failed.

        When the answer to a put is lost, TensorStore asks again and then finds its own object in
        the way. So what is there decides, and our bytes are ours.
        """
        try:
            there = self._find(name)
        except OSError as error:
            raise failure or error from None
        if there == data:
            return
        if there is not None:
            raise FileExistsError(errno.EEXIST, "exists already", self._url(name)) from failure
        if failure is not None:
            raise failure
        # a bucket that is not there also refuses, but fails when it is listed
        self._list(ts.KvStore.KeyRange(name, name + "\0"), name)
        raise OSError(errno.EIO, "refused as if it existed, and does not exist", self._url(name))

    def _await(self, future: "ts.Future[T]", name: str, count: int = 0) -> T:
        patience = PATIENCE + count / SLOWEST
        try:
            return future.result(timeout=patience)
        except TimeoutError:
            future.cancel()
            message = f"no end within {patience:.1f} s"
            raise TimeoutError(errno.ETIMEDOUT, message, self._url(name)) from None
        except (ValueError, NotImplementedError) as error:
            raise _os_error(str(error), self._url(name)) from None

    def _url(self, name: str) -> str:
        return f"{self._base}/{name}"


def _key(name: str) -> str:
    """A name as a key; an HTTP client would resolve `..`, and so leave the place."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} has an empty part, '.' or '..', which no name here may have")
    return name


def _below(folder: str) -> ts.KvStore.KeyRange:
    """The keys below a folder; `"0"` follows the slash."""
    if not folder:
        return ts.KvStore.KeyRange()
    return ts.KvStore.KeyRange(_key(folder) + "/", _key(folder) + "0")


def _os_error(message: str, url: str) -> OSError:
    """TensorStore raises all as ValueError: `CODE: what happened [detail='…'] [detail='…']`."""
    text = re.split(r" \[[\w-]+='", message)[0]
    if status := re.search(r"\[http_response_code='(\d+)'\]", message):
        text = f"{text} (HTTP {status[1]})"
    code = re.match(r"[A-Z_]+(?=:)", text)
    return OSError(ERRNO.get(code and code[0], errno.EIO), text, url)
