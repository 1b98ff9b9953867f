"""Damage, and where it lies."""

from collections.abc import Sequence
from typing import NamedTuple

SHOWN = 20  # faults that an error names


class Fault(NamedTuple):
    """Something of a checkpoint that is not as it was written.

    Attributes:
      file: its path below the checkpoint.
      what: is wrong.
      array: the name of the array, if the file holds a part of one.
      extent: which part: its place in the grid of chunks.
    """

    file: str
    what: str
    array: str | None = None
    extent: tuple[int, ...] | None = None

    def __str__(self) -> str:
        where = "" if self.array is None else f" (array {self.array}, extent {self.extent})"
        return f"{self.file}{where}: {self.what}"


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
