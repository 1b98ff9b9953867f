"""From a URL to a place."""

from pathlib import Path

from whalejax.storage.files import Files
from whalejax.storage.place import Place


def open(url: Path | str) -> Place:
    """A place for bytes.

    Args:
      url: a path.
    """
    return Files(Path(url))
