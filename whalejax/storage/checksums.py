"""Two checksums of the same bytes: CRC32C, and an XXH3 that is independent of it.

A CRC32C is what hardware computes (16 GiB/s a core here), and it tells where a single flipped bit
lies. XXH3 (33 GiB/s) tells whether a mended copy is the one that was written.
"""

from collections.abc import Iterable
from typing import NamedTuple

import crc32c
import xxhash

from whalejax.storage.polynomials import ORDER, logarithm, power, product

LOCATABLE = ORDER // 8  # bytes, one less than 256 MiB: beyond, two positions have one checksum
# Bytes that are still in a core's cache when they are used the next time; with smaller ones threads
# wait for the GIL: 16 of them read 21 GB/s in pieces of 2 MiB, 15 of 1 MiB, 7 of 512 KiB.
PIECE = 2**21


class Digest(NamedTuple):
    """Checksums of a run of bytes: CRC32C (Castagnoli, 32 bits) and XXH3 (64 bits, seed 0)."""

    crc32c: int
    xxh3: int


class Running:
    """Checksums of bytes that come in pieces.

    Args:
      xxh3: also the second one; a restore needs but the first.
    """

    def __init__(self, *, xxh3: bool = True):
        self._crc32c = 0
        self._xxh3 = xxhash.xxh3_64() if xxh3 else None

    def update(self, piece: memoryview | bytes) -> None:
        """Adds the bytes that follow; large pieces without the GIL."""
        self._crc32c = crc32c.crc32c(piece, self._crc32c)
        if self._xxh3 is not None:
            self._xxh3.update(piece)

    @property
    def crc32c(self) -> int:
        """Of all bytes so far."""
        return self._crc32c

    def digest(self) -> Digest:
        """Both, of all bytes so far.

        Raises:
          ValueError: made without `xxh3`.
        """
        if self._xxh3 is None:
            raise ValueError("these checksums are running without xxh3")
        return Digest(self._crc32c, self._xxh3.intdigest())


def pieces(buffer: memoryview) -> Iterable[memoryview]:
    """A buffer of bytes cut into pieces that fit a core's cache."""
    return (buffer[start : start + PIECE] for start in range(0, len(buffer), PIECE))


def digest(*buffers: memoryview | bytes) -> Digest:
    """The checksums of buffers, one after the other."""
    running = Running()
    for buffer in buffers:
        for piece in pieces(memoryview(buffer).cast("B")):
            running.update(piece)
    return running.digest()


def flipped_bit(stored: int, computed: int, size: int) -> int | None:
    """The only bit by which damaged bytes can differ from those that were stored.

    A CRC is linear: whatever the bytes are, a flipped bit changes it by `x**(32 + k) mod P`, k bits
    before the end. A worse fault looks like a flipped bit too with a chance of `8 * size / 2**32`
    (6 % of 32 MiB), so what is mended so needs another checksum to prove it.

    Args:
      stored: the CRC32C of the bytes as they were.
      computed: the CRC32C of the bytes as they are.
      size: how many bytes they are, 2**28 - 1 at most.

    Returns:
      `8 * byte + bit`, bit 0 the lowest of its byte; None if no single bit explains the difference,
      or there is none.

    Raises:
      ValueError: `size` is negative, or so large that positions cannot be told apart.
    """
    if not 0 <= size <= LOCATABLE:
        raise ValueError(f"size={size} must be 0 to {LOCATABLE}: beyond, CRC32C repeats")
    from_end = logarithm(product(stored ^ computed, power(-32)), below=8 * size)
    return None if from_end is None else 8 * size - 1 - from_end
