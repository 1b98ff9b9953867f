"""What differs between two checkpoints; digests tell where, so that only that is read."""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from whalejax.checkpoint.faults import DamagedError
from whalejax.checkpoint.layout import ArrayLayout, Box, lengths
from whalejax.checkpoint.manifest import Manifest, StoredArray
from whalejax.checkpoint.reading import Part, read_parts
from whalejax.storage import Place
from whalejax.storage.memory import host_array

TURN_BYTES = 2**28  # of each of the two checkpoints, on the host at once; or one extent


class ContentDifference(NamedTuple):
    """How an array's elements differ.

    Attributes:
      differing: elements with other bytes.
      elements: of the array.
      largest_absolute: difference of two floating-point or complex numbers; NaN where only one of
        the two is NaN; None for other dtypes.
      largest_relative: likewise, by the larger magnitude of the two.
    """

    differing: int
    elements: int
    largest_absolute: float | None = None
    largest_relative: float | None = None

    def __str__(self) -> str:
        counts = f"{self.differing} of {self.elements} elements differ"
        if self.largest_absolute is None:
            return counts
        by = f"by up to {self.largest_absolute:.4g} (relative: {self.largest_relative:.4g})"
        return f"{counts}, {by}"


class Difference(NamedTuple):
    """What differs between checkpoints a and b; `str` of it has a row for each thing.

    Attributes:
      a, b: their steps.
      only_a, only_b: names of arrays and values that one of them lacks.
      layouts: arrays of other shapes, dtypes or kinds of PRNG keys, as they are in both; they are
        compared no further.
      contents: arrays with other elements.
      values: other numbers, strings and static parts of QuantizedArrays, as they are in both.
      metadata: the user's, as it is in both; None if equal.
      by_digests: how many arrays are equal by their digests alone, without reading them.
      by_reading: how many were found equal by reading them, as they are cut into other extents.
    """

    a: int
    b: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layouts: dict[str, tuple[str, str]]
    contents: dict[str, ContentDifference]
    values: dict[str, tuple[Any, Any]]
    metadata: tuple[Any, Any] | None
    by_digests: int
    by_reading: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        found = (self.only_a, self.only_b, self.layouts, self.contents, self.values)
        return not any(found) and self.metadata is None

    def rows(self) -> list[str]:
        """A line for each thing that differs, and one for those that do not."""
        rows = [f"{name}: only in step {self.a}" for name in self.only_a]
        rows += [f"{name}: only in step {self.b}" for name in self.only_b]
        rows += [f"{name}: {a} became {b}" for name, (a, b) in self.layouts.items()]
        rows += [f"{name}: {content}" for name, content in self.contents.items()]
        rows += [f"{name}: {a!r} became {b!r}" for name, (a, b) in self.values.items()]
        if self.metadata is not None:
            rows.append(f"metadata: {self.metadata[0]!r} became {self.metadata[1]!r}")
        equal = f"{self.by_digests} arrays are equal by their digests, without reading them"
        return [*rows, f"{equal}; {self.by_reading} by reading them"]

    def __str__(self) -> str:
        return "\n".join(self.rows())


def compare(place: Place, a: Manifest, b: Manifest) -> Difference:
    """Compares two checkpoints of a place, each in the folder of its step.

    Arrays that are cut alike differ where their digests do, and only there they are read; others
    of one shape and dtype are read whole, at most `TURN_BYTES` of each at a time.

    Raises:
      DamagedError: what has to be read is damaged.
    """
    layouts, contents, by_digests, by_reading = {}, {}, 0, 0
    for name in sorted(a.arrays.keys() & b.arrays.keys()):
        pair = a.arrays[name], b.arrays[name]
        if _described(pair[0].layout) != _described(pair[1].layout):
            layouts[name] = _described(pair[0].layout), _described(pair[1].layout)
        elif pair[0] == pair[1]:
            by_digests += 1
        elif (content := _compare_content(place, (a.step, b.step), name, pair)).differing:
            contents[name] = content
        else:
            by_reading += 1
    in_a, in_b = _leaves(a), _leaves(b)
    return Difference(
        a=a.step,
        b=b.step,
        only_a=tuple(sorted(in_a.keys() - in_b.keys())),
        only_b=tuple(sorted(in_b.keys() - in_a.keys())),
        layouts=layouts,
        contents=contents,
        values=_differing_values(in_a, in_b),
        metadata=None if _same(a.metadata, b.metadata) else (a.metadata, b.metadata),
        by_digests=by_digests,
        by_reading=by_reading,
    )


def _leaves(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint holds by name: that it is an array, a value, static parts."""
    return dict.fromkeys(manifest.arrays, ("array",)) | manifest.quantized | manifest.values


def _differing_values(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """An array that became a value counts too."""
    shared = sorted(a.keys() & b.keys())
    return {name: (a[name], b[name]) for name in shared if not _same(a[name], b[name])}


def _same(a: Any, b: Any) -> bool:
    """Whether two pieces of JSON are the same text: 1 is neither 1.0 nor true, NaN is NaN."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _described(layout: ArrayLayout) -> str:
    """An array's dtype, shape and kind of PRNG keys."""
    key = "" if layout.key is None else f" of {layout.key} keys"
    return f"{layout.dtype.name}{list(layout.shape)}{key}"


def _compare_content(
    place: Place, steps: tuple[int, int], name: str, pair: tuple[StoredArray, StoredArray]
) -> ContentDifference:
    layout = pair[0].layout
    total = compare_elements(np.empty(0, layout.dtype), np.empty(0, layout.dtype))
    for boxes in _turns(layout, _suspected(*pair)):
        parts = [
            [Part(box, host_array(lengths(box), layout.dtype)) for box in boxes] for _ in steps
        ]
        for step, stored, own in zip(steps, pair, parts, strict=True):
            _read(place, step, {name: (stored, own)})
        for of_a, of_b in zip(*parts, strict=True):
            total = _joined(total, compare_elements(of_a.memory, of_b.memory))
    return total._replace(elements=math.prod(layout.shape))


def _read(place: Place, step: int, wanted: dict[str, tuple[StoredArray, list[Part]]]) -> None:
    try:
        read_parts(place, str(step), wanted)
    except DamagedError as error:
        faults = [fault._replace(file=f"{step}/{fault.file}") for fault in error.faults]
        raise DamagedError(faults) from None  # of two steps, say which


def _suspected(a: StoredArray, b: StoredArray) -> Iterator[Box]:
    """The chunks of the first array in which the two can differ."""
    alike = a.layout == b.layout
    for number, index in enumerate(a.layout.indices()):
        if not alike or a.digests[number] != b.digests[number]:
            yield a.layout.box(index)


def _turns(layout: ArrayLayout, boxes: Iterator[Box]) -> Iterator[list[Box]]:
    """Boxes in groups that are on the host together."""
    group: list[Box] = []
    for box in boxes:
        if group and (len(group) + 1) * layout.extent_bytes > TURN_BYTES:
            yield group
            group = []
        group.append(box)
    if group:
        yield group


def compare_elements(a: np.ndarray, b: np.ndarray) -> ContentDifference:
    """How two arrays of one shape and dtype differ, by their elements' bytes."""
    differs = np.any(_words(a) != _words(b), axis=1)
    count = int(differs.sum())
    if not jnp.issubdtype(a.dtype, np.inexact):
        return ContentDifference(count, a.size)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    x, y = (array.reshape(-1)[differs].astype(wide) for array in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(np.isnan(x) & np.isnan(y), 0, np.abs(x - y))
        larger = np.maximum(np.abs(x), np.abs(y))
        relative = np.divide(apart, larger, out=apart.copy(), where=(apart > 0) & (apart < np.inf))
    return ContentDifference(
        count, a.size, float(apart.max(initial=0)), float(relative.max(initial=0))
    )


def _words(array: np.ndarray) -> np.ndarray:
    """`u[N, M]`: each element's bytes, in unsigned integers as wide as they fit."""
    width = min(array.dtype.itemsize, 8)
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{width}").reshape(-1, array.dtype.itemsize // width)


def _joined(a: ContentDifference, b: ContentDifference) -> ContentDifference:
    if a.largest_absolute is None:
        return ContentDifference(a.differing + b.differing, a.elements + b.elements)
    return ContentDifference(
        a.differing + b.differing,
        a.elements + b.elements,
        float(np.maximum(a.largest_absolute, b.largest_absolute)),  # a NaN stays
        float(np.maximum(a.largest_relative, b.largest_relative)),
    )
