"""How an array is cut into extents: the chunks of a zarr3 array, each a file of its own.

An extent is one run of bytes of one shard, so that it can be written from where it lies. It never
crosses a shard's edge: each has one writer, and a mesh that cuts elsewhere reads what intersects.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

Box = tuple[tuple[int, int], ...]  # start and stop along each axis
Index = tuple[int, ...]

# what zarr3 has no name for is stored as bytes, its own name beside it
UNKNOWN_TO_ZARR = (
    *("int1", "uint1", "uint2", "uint4"),
    *("float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3"),
)


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """An array and its chunks.

    Attributes:
      shape: of the array.
      dtype: as it is stored, little-endian.
      chunk: shape of each chunk; the last ones along an axis may reach beyond the array, and are
        filled up with zeros.
      key: the PRNG's name, if the array is the data of keys; its last axis is that of the words.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    key: str | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(
            -(-length // size) for length, size in zip(self.shape, self.chunk, strict=True)
        )

    @property
    def extent_bytes(self) -> int:
        """Bytes of an extent, those filled up included."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def indices(self) -> Iterator[Index]:
        """The chunks' places in the grid, the last axis fastest."""
        return itertools.product(*(range(count) for count in self.grid))

    def box(self, index: Index) -> Box:
        """What part of the array a chunk holds."""
        return tuple(
            (i * size, min((i + 1) * size, length))
            for i, size, length in zip(index, self.chunk, self.shape, strict=True)
        )

    def touching(self, box: Box) -> Iterator[Index]:
        """The chunks that share an element with a box."""
        if any(start >= stop for start, stop in box):
            return iter(())
        return itertools.product(
            *(
                range(start // size, -(-stop // size))
                for (start, stop), size in zip(box, self.chunk, strict=True)
            )
        )


def choose_chunk(
    shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int, extent_bytes: int
) -> tuple[int, ...]:
    """The shape of chunks of about `extent_bytes` that cut each shard into runs of bytes.

    Leading axes are cut first. An axis that lies in one shard is cut into equal parts, the last one
    filled up; an axis with several shards only by a divisor of theirs.
    """
    chunk = list(shard)
    for axis, length in enumerate(shard):
        below = math.prod(shard[axis + 1 :]) * itemsize
        if length * below <= extent_bytes:
            break
        rows = max(extent_bytes // below, 1)
        chunk[axis] = _part(length, rows, whole=length == shape[axis])
    return tuple(max(size, 1) for size in chunk)


def _part(length: int, most: int, *, whole: bool) -> int:
    if whole:
        return -(-length // -(-length // most))
    small = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    divisors = small + [length // d for d in reversed(small)]
    return min(divisors, key=lambda d: abs(math.log(d / most)))


def overlap(a: Box, b: Box) -> Box:
    """The part that two boxes share; empty along an axis where they do not meet."""
    return tuple(
        (max(p, r), max(min(q, s), max(p, r))) for (p, q), (r, s) in zip(a, b, strict=True)
    )


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The slices of a box in an array that holds `outer`."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(box, outer, strict=True)
    )


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def extent_file(name: str, index: Index) -> str:
    """The file of an extent, in zarr3's default encoding of keys."""
    return f"arrays/{name}/{'/'.join(['c', *map(str, index)])}"


def zarr_file(name: str) -> str:
    """The file that tells other programs of an array."""
    return f"arrays/{name}/zarr.json"


def zarr_json(layout: ArrayLayout) -> bytes:
    """The metadata of a zarr3 array that stores bytes as they are."""
    dtype, attributes = layout.dtype.name, {}
    if dtype in UNKNOWN_TO_ZARR:
        dtype, attributes = "uint8", {"dtype": dtype}
    if layout.key is not None:
        attributes["prng"] = layout.key
    fill = False if dtype == "bool" else [0, 0] if layout.dtype.kind == "c" else 0
    codec = {"name": "bytes"}
    if layout.dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": layout.shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [codec],
        "attributes": attributes,
    }
    return json.dumps(metadata, indent=1).encode() + b"\n"


def dtype_named(name: str) -> np.dtype:
    """A dtype of NumPy's or of ml_dtypes by its name.

    Raises:
      ValueError: there is none of this name.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ValueError(f"{name!r} is no dtype that is known here") from None
