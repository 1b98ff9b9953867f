"""Damage, and where it lies."""

from collections.abc import Sequence
from typing import Any, NamedTuple

SHOWN = 20  # faults that an error names


class Flip(NamedTuple):
    """One bit that would explain, by itself, why a file is not as it was written.

    Attributes:
      byte: of the file.
      bit: of the byte, 0 the lowest.
      confirmed: with the bit flipped back all checksums are those that were written; if not,
        something worse happened that only looks like one bit to a CRC32C.
      element: of the array, that the bit lies in; None outside of an array's elements.
      written, read: the element's value as it was written and as it is now.
    """

    byte: int
    bit: int
    confirmed: bool
    element: tuple[int, ...] | None = None
    written: Any = None
    read: Any = None

    def __str__(self) -> str:
        where = f"bit {self.bit} of byte {self.byte}"
        if not self.confirmed:
            return f"to a CRC32C it looks like {where}, but XXH3 says that it is something worse"
        if self.element is None:
            return f"{where} is flipped (confirmed)"
        element = f"element {list(self.element)} is {self.read} instead of {self.written}"
        return f"{where} is flipped (confirmed): {element}"


class Fault(NamedTuple):
    """Something of a checkpoint that is not as it was written.

    Attributes:
      file: its path below the checkpoint.
      what: is wrong.
      array: the name of the array, if the file holds a part of one.
      extent: which part: its place in the grid of chunks.
      flip: the one bit that would explain it, where `verify` found one.
    """

    file: str
    what: str
    array: str | None = None
    extent: tuple[int, ...] | None = None
    flip: Flip | None = None

    def __str__(self) -> str:
        where = "" if self.array is None else f" (array {self.array})"
        if self.extent is not None:
            where = f" (array {self.array}, extent {self.extent})"
        flip = "" if self.flip is None else f"; {self.flip}"
        return f"{self.file}{where}: {self.what}{flip}"


class DamagedError(ValueError):
    """A checkpoint is damaged; nothing of what is damaged was restored.

    Attributes:
      faults: all that were found.
    """

    def __init__(self, faults: Sequence[Fault]):
        self.faults = list(faults)
        shown = "; ".join(str(fault) for fault in self.faults[:SHOWN])
        more = len(self.faults) - SHOWN
        super().__init__(shown + (f"; and {more} more" if more > 0 else ""))
