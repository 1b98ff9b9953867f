"""3FS as its FUSE client shows itself: recognising a mount, deleting trees, laying out folders.

From the sources of 3FS (deepseek-ai/3FS, commit e2cef82): the mount's type is `fuse.hf3fs` and its
source `hf3fs.<cluster>`; at its root stands a virtual folder `3fs-virt` with
- `rm-rf`: a folder that is renamed into it is deleted by the servers, all of it at once,
- `iovs`: USRBIO registers shared memory here,
- `get-conf`: a symbolic link per setting, whose target is the value,
- `set-conf`: making such a link changes a setting.
It has hard links (the target's absence is part of the transaction) and O_EXCL, but no rename
flags, no locks between hosts, and no fsync of folders (names are durable at once).
"""

import errno
import os
import shlex
import shutil
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from whalejax.storage.mounts import TABLE, MountPoint, holding, listed, mount_points

SCHEME = "3fs:/"  # of any number of slashes: pathlib leaves but one of three
FSTYPE = "fuse.hf3fs"
VIRTUAL = "3fs-virt"
VIRTUAL_FOLDERS = ("rm-rf", "iovs", "get-conf", "set-conf")
# A storage target made without a list of its own (physical_config.chunk_size_list) takes no others.
CHUNK_SIZES = tuple(size * 2**10 for size in (512, 1024, 2048, 4096, 16384, 65536))
ADMIN = "admin_cli -cfg /opt/3fs/etc/admin_cli.toml"
OWNERS_ONLY = " (3FS deletes a tree only for its owner, who may read, write and enter all of it)"
STRIPE = 16  # of its chains 3FS uses so many for a new file (meta's dynamic_stripe_initial)


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A 3FS mount.

    Attributes:
      root: the mount point.
      inner: the folder of 3FS that is mounted there: "/", unless it is a bind mount.
      virtual: its virtual folder; None where only a part of 3FS was mounted, without it.
      rm_rf: trees can be renamed into `virtual / "rm-rf"`.
      usrbio: `virtual / "iovs"` takes shared memory.
      cluster: its cluster's name, if the table of mounts has it.
    """

    root: Path
    inner: PurePosixPath = PurePosixPath("/")
    virtual: Path | None
    rm_rf: bool
    usrbio: bool
    cluster: str | None = None


def find(path: Path | str, *, table: Path = TABLE) -> Mount | None:
    """The 3FS mount on which a path lies, which need not exist yet; None if it lies on none.

    A mount is recognised by its type, or by its virtual folder where a container hides the type.
    """
    real = Path(os.path.realpath(path))
    points = mount_points(table)
    point = holding(real, points)
    virtual = _virtual_folder(real)
    if point is not None and point.fstype == FSTYPE:
        return _mount_of_type(point, virtual, points)
    if virtual is None or _folders(virtual) != set(VIRTUAL_FOLDERS):
        return None
    return Mount(root=virtual.parent, virtual=virtual, rm_rf=True, usrbio=True)


def resolve(url: str) -> tuple[Path, Mount]:
    """The path of a URL `3fs:///mount/path`, and its mount.

    Raises:
      ValueError: the path lies on no 3FS mount; says what was looked for.
    """
    path = Path("/" + url.removeprefix(SCHEME).lstrip("/"))
    mount = find(path)
    if mount is None:
        point = holding(Path(os.path.realpath(path)), mount_points())
        kind = f"{point.fstype} at {point.path}" if point else "unknown"
        raise ValueError(
            f"{url}: {path} lies on no 3FS mount: its file system is {kind} instead of {FSTYPE}, "
            f"and no folder above it holds {VIRTUAL}/{{{','.join(VIRTUAL_FOLDERS)}}}"
        )
    return path, mount


def settings(mount: Mount) -> dict[str, str]:
    """The settings that 3FS' client shows: `sys.*` of the mount, `usr.*` of this user.

    For instance `usr.readonly`, `usr.attr_timeout` in seconds, `sys.periodic_sync.interval`.
    Empty without a virtual folder.
    """
    if mount.virtual is None or "get-conf" not in _folders(mount.virtual):
        return {}
    folder = mount.virtual / "get-conf"
    return {name: os.readlink(folder / name) for name in sorted(os.listdir(folder))}


def remove_tree(mount: Mount, path: Path | str, *, patience: float = 10.0) -> None:
    """Deletes a folder with all below it, in one transaction on the servers.

    The folder is renamed into `rm-rf`. A symbolic link made there deletes its target too, but the
    link's text is read by the client daemon, to which another folder may have that name (bind
    mounts); a rename cannot mean another folder than the one that this process sees. Space becomes
    free later. None of this name is no error. A mount without `rm-rf` gets an ordinary deletion,
    file by file, and a warning.

    Args:
      mount: as `find` gave it.
      path: a folder of the mount, no symbolic link.
      patience: seconds until the folder must be gone.

    Raises:
      ValueError: the path is not below the mount's root, or belongs to the virtual folder.
      NotADirectoryError: it is no folder.
      PermissionError: 3FS deletes a tree only for its owner, who may read, write and enter all.
      TimeoutError: what was renamed into `rm-rf` stays there: no 3FS behind it.
    """
    path = Path(path).absolute()
    if path.is_symlink() or path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder, and no tree to delete", str(path))
    path = Path(os.path.realpath(path))
    _check_below(mount, path)
    if not listed(path):
        return
    if not mount.rm_rf:
        warnings.warn(
            f"the 3FS mount {mount.root} offers no rm-rf: {path} is deleted file by file",
            RuntimeWarning,
            stacklevel=2,
        )
        shutil.rmtree(path)
        return
    _give_away(mount.virtual / "rm-rf", path, patience)


def advice(mount: Mount, path: Path | str, extent_bytes: int, nodes: int = STRIPE) -> list[str]:
    """The shell commands that lay out a folder for files of large extents.

    3FS has the layout of a folder (chain table, chunk size, stripe) inherited by what is made in
    it, and only its administration tool can set it. Run it as the user who will write there, with
    the cluster's `admin_cli.toml` (here at the place that 3FS' guide to deployment gives it).

    Args:
      mount: as `find` gave it.
      path: a folder on the mount; it need not exist. If it exists, its chain table stays, and what
        it holds already keeps its layout.
      extent_bytes: of one write or read, 512 KiB or a multiple.
      nodes: of storage; a file is striped over so many chains, at most those of the table.

    Returns:
      Commands, and comments that begin with "#"; none if the folder has the right chunk size.
      `<CHAIN_TABLE_ID>` has to be filled in, from what the first command prints.

    Raises:
      ValueError: no chunk size fits the extents, `nodes` is not positive, or the path is not below
        the mount's root.
    """
    chunk = chunk_bytes(extent_bytes)
    if nodes < 1:
        raise ValueError(f"nodes={nodes} must be positive")
    path = Path(path).absolute()
    inner = shlex.quote(str(_inner(mount, path)))
    layout = f"--chunk-size {chunk // 2**10}KB --stripe-size {nodes}"
    if path.is_dir():
        if path.stat().st_blksize == chunk:  # 3FS tells a folder's chunk size so
            return []
        return [_admin(f"set-layout {layout} {inner}"), _admin(f"stat --display-layout {inner}")]
    return [
        _admin("list-chain-tables"),
        f"# replace <CHAIN_TABLE_ID> by one of these, of {nodes} chains or more",
        _admin(f"mkdir --recursive --chain-table-id <CHAIN_TABLE_ID> {layout} {inner}"),
    ]


def chunk_bytes(extent_bytes: int) -> int:
    """The largest chunk size that every 3FS storage target takes and that divides an extent.

    3FS stores any power of two from 64 KiB to 64 MiB, but a target on its older engine refuses, at
    the first write, what its list of sizes does not hold: 8 and 32 MiB, unless someone added them.

    Raises:
      ValueError: none divides it.
    """
    fitting = [size for size in CHUNK_SIZES if extent_bytes % size == 0]
    if extent_bytes < 1 or not fitting:
        raise ValueError(
            f"extent_bytes={extent_bytes} is no multiple of a chunk size of 3FS, {CHUNK_SIZES[0]} "
            f"bytes or more"
        )
    return fitting[-1]


def _virtual_folder(real: Path) -> Path | None:
    above = (folder / VIRTUAL for folder in (real, *real.parents))
    return next((virtual for virtual in above if os.path.isdir(virtual)), None)


def _folders(virtual: Path) -> set[str]:
    return {name for name in VIRTUAL_FOLDERS if os.path.isdir(virtual / name)}


def _mount_of_type(point: MountPoint, virtual: Path | None, points: list[MountPoint]) -> Mount:
    if virtual is not None and not _same_system(holding(virtual, points), point):
        virtual = None
    there = _folders(virtual) if virtual else set()
    # where the virtual folder is a mount of its own, nothing can be renamed into it (EXDEV)
    joined = virtual is not None and holding(virtual, points) == point
    return Mount(
        root=point.path,
        inner=point.inner,
        virtual=virtual,
        rm_rf=joined and "rm-rf" in there,
        usrbio="iovs" in there,
        cluster=point.source.partition(".")[2] or None,
    )


def _same_system(one: MountPoint | None, other: MountPoint) -> bool:
    return one is not None and (one.fstype, one.source) == (other.fstype, other.source)


def _check_below(mount: Mount, path: Path) -> None:
    virtual = mount.virtual is not None and path.is_relative_to(mount.virtual)
    if virtual or path == mount.root or not path.is_relative_to(mount.root):
        raise ValueError(f"{path} is no folder below the root of the 3FS mount {mount.root}")


def _give_away(folder: Path, path: Path, patience: float) -> None:
    """Renames a folder into `rm-rf`, where it must not be seen again."""
    taken = folder / uuid.uuid4().hex  # a name that the kernel cannot remember from another tree
    try:
        os.rename(path, taken)
    except OSError as error:
        if listed(path):
            hint = OWNERS_ONLY if isinstance(error, PermissionError) else ""
            raise type(error)(error.errno, f"{error.strerror}{hint}", str(path)) from error
    deadline = time.monotonic() + patience
    while listed(taken):
        if time.monotonic() > deadline:
            why = f"still there after {patience} s: no 3FS client empties {folder}"
            raise TimeoutError(errno.ETIMEDOUT, why, str(taken))
        time.sleep(0.01)


def _inner(mount: Mount, path: Path) -> PurePosixPath:
    """A path as 3FS names it, from its own root."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(mount.root):
        raise ValueError(f"{path} does not lie on the 3FS mount {mount.root}")
    return mount.inner / real.relative_to(mount.root)


def _admin(command: str) -> str:
    return f"{ADMIN} {shlex.quote(command)}"
