"""The manifest: what a checkpoint consists of, with both checksums of every extent."""

import dataclasses
import json
from typing import Any

from whalejax.checkpoint.faults import DamagedError, Fault
from whalejax.checkpoint.layout import ArrayLayout, dtype_named
from whalejax.storage import Digest, digest

MANIFEST = "manifest.json"
FORMAT, VERSION = "whalejax.checkpoint", 1
# The digest of all that stands between the opening and the closing, which are of fixed length: so
# every byte of the file is either covered or compared.
OPENING = '{"crc32c": "%08x", "xxh3": "%016x", "content":\n'
CLOSING = b"\n}\n"
OPENING_BYTES = len(OPENING % (0, 0))


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint: its layout, and the digests of its extents in the grid's order."""

    layout: ArrayLayout
    digests: tuple[Digest, ...]

    @property
    def nbytes(self) -> int:
        """Of its extents."""
        return len(self.digests) * self.layout.extent_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
      step: of training; None for an item of Orbax, which knows it itself.
      created: when, in UTC, by ISO 8601.
      arrays: by name.
      values: leaves that are Python's numbers or strings, by name.
      quantized: the static parts of QuantizedArrays, by name.
      metadata: the user's, JSON.
    """

    step: int | None
    created: str
    arrays: dict[str, StoredArray]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantized: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Any = None

    @property
    def nbytes(self) -> int:
        """Of all extents."""
        return sum(array.nbytes for array in self.arrays.values())

    def encode(self) -> bytes:
        """The manifest's file."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {name: _encoded(array) for name, array in self.arrays.items()}
        return seal(content | {"format": FORMAT, "version": VERSION, "arrays": arrays})


def copy_metadata(metadata: Any) -> Any:
    """What a manifest will hold of a user's metadata, which may change afterwards.

    Raises:
      ValueError: it is no JSON.
    """
    try:
        return json.loads(json.dumps(metadata, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata={metadata!r} is no JSON: {error}") from None


def decode(data: bytes, file: str) -> Manifest:
    """A manifest from the bytes of its file.

    Raises:
      DamagedError: they are not those that were written.
      ValueError: they are of a later version, or no manifest.
    """
    content = unseal(data, file)
    kind, version = content.get("format"), content.get("version")
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{file} is {kind} of version {version}, not {FORMAT} {VERSION}")
    return Manifest(
        step=content["step"],
        created=content["created"],
        arrays={name: _decoded(array) for name, array in content["arrays"].items()},
        values=content["values"],
        quantized=content["quantized"],
        metadata=content["metadata"],
    )


def seal(content: Any) -> bytes:
    """JSON that carries its own checksums."""
    return sealed(json.dumps(content, separators=(",", ":"), sort_keys=True).encode())


def sealed(body: bytes) -> bytes:
    """Bytes between their checksums and the closing."""
    return (OPENING % digest(body)).encode() + body + CLOSING


def unseal(data: bytes, file: str) -> Any:
    """What `seal` was given.

    Raises:
      DamagedError: a byte of it is another one.
    """
    body = data[OPENING_BYTES : -len(CLOSING)]
    if data != sealed(body):
        raise DamagedError([Fault(file, "its checksums are not those of its content")])
    return json.loads(body)


def _encoded(array: StoredArray) -> dict[str, Any]:
    layout = array.layout
    record = {
        "shape": layout.shape,
        "dtype": layout.dtype.name,
        "chunk": layout.chunk,
        "crc32c": [f"{d.crc32c:08x}" for d in array.digests],
        "xxh3": [f"{d.xxh3:016x}" for d in array.digests],
    }
    return record | ({} if layout.key is None else {"key": layout.key})


def _decoded(record: dict[str, Any]) -> StoredArray:
    layout = ArrayLayout(
        shape=tuple(record["shape"]),
        dtype=dtype_named(record["dtype"]),
        chunk=tuple(record["chunk"]),
        key=record.get("key"),
    )
    pairs = zip(record["crc32c"], record["xxh3"], strict=True)
    return StoredArray(layout, tuple(Digest(int(c, 16), int(x, 16)) for c, x in pairs))
