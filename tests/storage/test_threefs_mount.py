"""3FS as Linux shows it: the kernel's FUSE stands between `Files` and a daemon that imitates 3FS.

It proves what the kernel remembers and how it moves folders, not what 3FS' servers do.
"""

import errno
import os
import shlex
import signal
from pathlib import Path

import pytest

from whalejax import storage
from whalejax.info import storage_lines
from whalejax.storage import threefs

MIB = 2**20


@pytest.fixture
def place(threefs_mount):
    return storage.open(f"3fs://{threefs_mount}/run")


def filled(place, step):
    place.write(f"{step}/extents/0", [memoryview(bytes(range(250)) * 12_000)])
    place.put(f"{step}/manifest", b"x" * 1000)
    place.sync(step)
    return place


def test_the_mount_is_known_by_its_type(place, threefs_mount):
    assert place.kind == "3fs"
    assert place.mount == threefs.Mount(
        root=threefs_mount,
        virtual=threefs_mount / "3fs-virt",
        rm_rf=True,
        usrbio=True,
        cluster="stage",
    )
    _, system, abilities, *_ = storage_lines(threefs_mount)
    assert system == f"  fuse.hf3fs at {threefs_mount} (hf3fs.stage), 1.0 GiB free"
    assert abilities.endswith("USRBIO: yes, usr.readonly=false, usr.attr_timeout=30")


def test_files_do_on_it_what_they_do_on_a_disk(place):
    filled(place, "1")
    buffer = memoryview(bytearray(3_000_000))
    place.read("1/extents/0", buffer)
    assert bytes(buffer) == bytes(range(250)) * 12_000
    assert place.names("") == ["1/extents/0", "1/manifest"]
    place.rename("1", "2")
    assert (place.folders(""), place.get("2/manifest")) == (["2"], b"x" * 1000)


def test_an_exclusive_put_is_a_hard_link(place):
    place.put("once", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        place.put("once", b"second", exclusive=True)
    assert (place.names(""), place.get("once")) == (["once"], b"first")


def test_after_a_rename_whose_answer_was_lost_stat_is_wrong_and_files_are_right(
    place, threefs_mount, monkeypatch
):
    filled(place, "1.tmp")
    assert place.size("1/manifest") is None  # the kernel remembers for 5 s that there is no "1"
    (threefs_mount / "3fs-virt/set-conf/lose-rename").symlink_to("next")
    rename, seen = os.rename, []

    def watched(source, target):
        try:
            rename(source, target)
        except OSError as error:
            seen.append((error.errno, Path(source).exists(), Path(target).exists()))
            raise

    monkeypatch.setattr(os, "rename", watched)
    place.rename("1.tmp", "1")
    assert seen == [(errno.EIO, True, False)]
    assert place.size("1/manifest") == 1000 and place.folders("") == ["1"]


def test_a_tree_is_removed_without_a_request_for_each_file(place, threefs_mount):
    counter = threefs_mount / "3fs-virt/get-conf/sys.deletions"
    before = os.readlink(counter)
    for parent in ("a", "b"):  # of one name, one after the other
        filled(place, f"{parent}/step").remove_tree(f"{parent}/step")
    assert place.names("") == [] and place.folders("a") == []
    assert os.readlink(counter) == before == "0"
    filled(place, "a/step")  # the name is free again
    assert place.get("a/step/manifest") == b"x" * 1000


def test_advice_knows_the_chunk_size_of_a_folder(place, threefs_mount):
    filled(place, "1")
    assert threefs.advice(place.mount, threefs_mount / "run", 8 * MIB) == []
    command, _ = threefs.advice(place.mount, threefs_mount / "run", 32 * MIB)
    assert shlex.split(command)[3].startswith("set-layout --chunk-size 16384KB")


def test_a_mount_whose_daemon_died_is_still_3fs_and_says_what_is_wrong(place, threefs_mount):
    filled(place, "1")
    os.kill(int(os.readlink(threefs_mount / "3fs-virt/get-conf/sys.pid")), signal.SIGKILL)
    again = storage.open(threefs_mount / "run")
    assert again.kind == "3fs"
    for attempt in (lambda: again.get("1/manifest"), lambda: again.put("x", b"")):
        with pytest.raises(OSError, match="not connected|aborted") as error:
            attempt()
        assert str(threefs_mount) in error.value.filename
