"""What files do beyond the contract: durability, short reads and writes, and disks that fail."""

import errno
import os
from pathlib import Path

import pytest

from whalejax.storage.checksums import PIECE
from whalejax.storage.files import Files


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "place")


@pytest.fixture
def synced(monkeypatch):
    """What was synchronised, in order: path and bytes at that moment, None for a folder."""
    calls, fsync = [], os.fsync

    def record(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        calls.append((path, path.read_bytes() if path.is_file() else None))
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    return calls


def failing(error, function=None, calls=1):
    """`function` for some calls, then an error."""
    left = iter(range(calls if function else 0))

    def call(*arguments, **options):
        if next(left, None) is None:
            raise OSError(error, os.strerror(error))
        return function(*arguments, **options)

    return call


def test_a_written_file_is_durable(files, synced):
    files.write("a/file", [memoryview(b"12"), memoryview(b"3")])
    assert synced == [(files.root / "a/file", b"123")]


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_put_is_durable_before_it_is_seen_and_its_name_after(files, synced, exclusive):
    files.put("a/file", b"123", exclusive=exclusive)
    (beside, data), folder = synced
    assert data == b"123" and beside.parent == files.root / "a" and not beside.exists()
    assert folder == (files.root / "a", None)


def test_names_are_made_durable_bottom_up(files, synced):
    for name in ("step/a/1", "step/b/c/2"):
        files.write(name, [])
    synced.clear()
    files.sync("step")
    folders = [path.relative_to(files.root).as_posix() for path, _ in synced]
    assert sorted(folders) == [".", "step", "step/a", "step/b", "step/b/c"]
    assert folders.index("step/b/c") < folders.index("step/b") < folders.index("step")
    assert folders[-1] == "."


def test_a_rename_is_durable(files, synced):
    files.write("step.tmp/file", [])
    synced.clear()
    files.rename("step.tmp", "step")
    assert synced == [(files.root, None)]


def test_a_rename_whose_answer_is_lost_happened(files, monkeypatch):
    rename = os.rename

    def lose_the_answer(*arguments):
        rename(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "rename", lose_the_answer)
    files.write("step.tmp/file", [memoryview(b"1")])
    files.rename("step.tmp", "step")
    assert files.names("") == ["step/file"]


@pytest.mark.parametrize("target", [None, "step"], ids=["no target", "empty target"])
def test_a_rename_that_failed_is_an_error(files, monkeypatch, target):
    files.write("step.tmp/file", [memoryview(b"1")])
    if target:
        (files.root / target).mkdir()
    monkeypatch.setattr(os, "rename", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.rename("step.tmp", "step")
    assert files.names("") == ["step.tmp/file"]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_put_onto_a_full_disk_leaves_what_was_there(files, monkeypatch, function, exclusive):
    name = "new" if exclusive else "old"
    files.put("old", b"old")
    monkeypatch.setattr(os, function, failing(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: .*/place/\..*\.tmp") as caught:
        files.put(name, b"new", exclusive=exclusive)
    assert caught.value.errno == errno.ENOSPC
    assert files.names("") == ["old"] and files.get("old") == b"old"


def test_a_full_disk_is_told_with_the_name(files, monkeypatch):
    monkeypatch.setattr(os, "write", failing(errno.ENOSPC, os.write))
    with pytest.raises(OSError, match="No space left on device: .*/place/file"):
        files.write("file", [memoryview(bytes(2 * PIECE))])


def test_short_reads_and_writes_go_on(files, monkeypatch):
    write, readv = os.write, os.readv
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:100_001]))
    monkeypatch.setattr(os, "readv", lambda file, buffers: readv(file, [buffers[0][:99_999]]))
    data = os.urandom(PIECE + 12_345)
    files.write("file", [memoryview(data)])
    buffer = bytearray(len(data))
    files.read("file", memoryview(buffer))
    assert buffer == data == (files.root / "file").read_bytes()


def test_a_file_cut_while_it_is_read_is_an_error(files, monkeypatch):
    files.write("file", [memoryview(bytes(PIECE + 1000))])
    readv = os.readv

    def cut_afterwards(file, buffers):
        count = readv(file, buffers)
        os.truncate(files.root / "file", PIECE + 1)
        return count

    monkeypatch.setattr(os, "readv", cut_afterwards)
    with pytest.raises(ValueError, match=r"place/file became shorter.*: 999 bytes missing"):
        files.read("file", memoryview(bytearray(PIECE + 1000)))


@pytest.mark.parametrize("operation", ["names", "sync"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(files, monkeypatch, operation):
    files.write("a/b/file", [])
    monkeypatch.setattr(os, "scandir", failing(errno.EIO, os.scandir))
    with pytest.raises(OSError, match="Input/output error"):
        getattr(files, operation)("a")


def test_a_folder_without_synchronisation_is_left_alone(files, monkeypatch):
    files.write("a/file", [])
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    files.sync("a")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error: .*/place/a"):
        files.sync("a")
