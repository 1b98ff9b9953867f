"""Which single bit, flipped, explains that bytes are not those that were written."""

import re

import numpy as np

from whalejax.checkpoint.faults import Flip
from whalejax.checkpoint.manifest import CLOSING, OPENING, OPENING_BYTES, sealed
from whalejax.storage import Digest, digest
from whalejax.storage.checksums import LOCATABLE, flipped_bit

_opening = re.compile(
    re.escape(OPENING).replace("%08x", "([0-9a-f]{8})").replace("%016x", "([0-9a-f]{16})").encode()
)


def turn(buffer: np.ndarray, bit: int) -> None:
    """Flips bit `bit % 8` of byte `bit // 8`, in place."""
    buffer[bit // 8] ^= 1 << bit % 8


def flip_back(buffer: np.ndarray, found: Digest, wanted: Digest) -> Flip | None:
    """Flips back, in place, the one bit that explains by CRC32C what the checksums have become.

    Args:
      buffer: `u8[N]`, the bytes as they are; with more than 256 MiB positions repeat, and none is
        looked for.
      found: their checksums.
      wanted: those of the bytes that were written.

    Returns:
      The bit, confirmed if both checksums are now those that are wanted; None if no bit explains
      them, and `buffer` is as it was.
    """
    if buffer.nbytes > LOCATABLE:
        return None
    bit = flipped_bit(wanted.crc32c, found.crc32c, buffer.nbytes)
    if bit is None:
        return None
    turn(buffer, bit)
    return Flip(bit // 8, bit % 8, confirmed=digest(memoryview(buffer)) == wanted)


def only_difference(read: bytes, written: bytes) -> Flip | None:
    """The one bit by which bytes differ from those that are known to have been written."""
    if len(read) != len(written):
        return None
    differing = np.frombuffer(read, np.uint8) ^ np.frombuffer(written, np.uint8)
    (places,) = np.nonzero(differing)
    if len(places) != 1 or int(differing[places[0]]).bit_count() != 1:
        return None
    return Flip(int(places[0]), int(differing[places[0]]).bit_length() - 1, confirmed=True)


def mend_seal(data: bytes) -> tuple[bytes, Flip] | None:
    """A sealed file as it was before one bit of it was flipped, wherever that lies.

    Args:
      data: what `unseal` refuses.

    Returns:
      The file and the bit; None if more than one bit is wrong.
    """
    body = data[OPENING_BYTES : -len(CLOSING)]
    whole = sealed(body)
    if (flip := only_difference(data, whole)) is not None:  # in the opening or the closing
        return whole, flip
    opening = _opening.fullmatch(data[:OPENING_BYTES])
    if opening is None or not data.endswith(CLOSING):
        return None
    buffer = np.frombuffer(body, np.uint8).copy()
    wanted = Digest(*(int(field, 16) for field in opening.groups()))
    flip = flip_back(buffer, digest(body), wanted)
    if flip is None or not flip.confirmed:
        return None
    return sealed(buffer.tobytes()), flip._replace(byte=OPENING_BYTES + flip.byte)
