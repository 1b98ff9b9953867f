"""From a URL to a place."""

from pathlib import Path

from whalejax.storage import threefs
from whalejax.storage.files import Files
from whalejax.storage.place import Place

SCHEMES = ("3fs",)


def open(url: Path | str) -> Place:
    """A place for bytes.

    Args:
      url: a path, or `3fs:///mount/path` where it must lie on a 3FS mount. A plain path on a 3FS
        mount gives the same place.

    Raises:
      ValueError: a path that was called 3FS lies on no 3FS mount.
    """
    if str(url).startswith(threefs.SCHEME):
        path, mount = threefs.resolve(str(url))
    else:
        path, mount = Path(url), threefs.find(url)
    return Files(path, mount=mount)
