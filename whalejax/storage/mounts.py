"""The mounts of this machine, as Linux tells a process of its own."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

TABLE = Path("/proc/self/mountinfo")


class MountPoint(NamedTuple):
    """A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

    Attributes:
      path: where it is mounted.
      inner: the folder of the mounted file system that stands there: "/", or another one for a
        bind mount.
      fstype: `"ext4"`, `"fuse.hf3fs"`, …
      source: the device, or what a FUSE daemon calls itself.
    """

    path: Path
    inner: PurePosixPath
    fstype: str
    source: str


def mount_points(table: Path = TABLE) -> list[MountPoint]:
    """All mounts, the oldest first; none where the system has no such table (macOS)."""
    try:
        lines = table.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [_parsed(line) for line in lines]


def holding(path: Path, points: Sequence[MountPoint]) -> MountPoint | None:
    """The mount on which an absolute path without symbolic links lies; it need not exist.

    Of two mounts on one folder the younger hides the other.
    """
    above = [point for point in points if path.is_relative_to(point.path)]
    return max(
        enumerate(above), key=lambda pair: (len(pair[1].path.parts), pair[0]), default=(0, None)
    )[1]


def listed(path: Path) -> bool:
    """Whether a folder's listing names `path`.

    A FUSE client may answer `stat` from its memory (3FS: 30 s for what is there, 5 s for what is
    not), even after a failed call that did its work; a listing asks the server.
    """
    try:
        return path.name in os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _parsed(line: str) -> MountPoint:
    mount, _, system = line.partition(" - ")
    inner, path = (_unescaped(field) for field in mount.split(" ")[3:5])
    fstype, source = (_unescaped(field) for field in system.split(" ")[:2])
    return MountPoint(Path(path), PurePosixPath(inner), fstype, source)


def _unescaped(field: str) -> str:
    """Blanks, tabs, line feeds and backslashes stand in the table as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
