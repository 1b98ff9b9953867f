"""Host memory for large arrays: fresh, or used again and again."""

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE  # where JAX on a CPU takes over an array as it is, and O_DIRECT begins
MAPPED = 2**20  # bytes from which an array gets pages of its own


def host_array(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array that begins on a page.

    Large ones are mapped as the system maps memory by default. NumPy would ask for huge pages, of
    which a virtual machine that gives free ones back to its host is dearly short: 2.4 s a GiB to
    touch them for the first time, measured on one such, where small pages take 0.4 s.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED:
        room = np.empty(nbytes + PAGE, np.uint8)
        start = -room.ctypes.data % PAGE
        return room[start : start + nbytes].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def padded(nbytes: int) -> int:
    """Bytes up to the next page."""
    return -(-nbytes // PAGE) * PAGE


class Arena:
    """Host memory that one user after the other reserves.

    It grows to the largest reservation and stays: memory that was never touched costs many times as
    much to write as memory that was.
    """

    def __init__(self):
        self._bytes = np.empty(0, np.uint8)

    @property
    def nbytes(self) -> int:
        """What it holds on to."""
        return self._bytes.nbytes

    def reserve(self, nbytes: int) -> np.ndarray:
        """`u8[nbytes]` that begins on a page; what was reserved before is no longer one's own."""
        if nbytes > self._bytes.nbytes:
            self._bytes = np.empty(0, np.uint8)  # first give the old one back
            self._bytes = host_array((nbytes,), np.uint8)
        return self._bytes[:nbytes]
