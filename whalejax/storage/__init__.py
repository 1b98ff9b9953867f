"""Bytes and where they lie: disks, 3FS, object stores; checksums and reusable buffers."""

from whalejax.storage.checksums import Digest, Running, digest
from whalejax.storage.opening import open
from whalejax.storage.place import Place

__all__ = ["Digest", "Place", "Running", "digest", "open"]
