"""A disk that fails: what `Files` then says, and what it leaves behind."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from whalejax import storage

MIB = 2**20
CODE = """
import sys
from whalejax import storage
place = storage.open(sys.argv[1])
try:
    {}
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
else:
    print("no error")
"""
BIG = f"memoryview(bytes(3 * {MIB}))"
WRITE = f"place.write('deep/extent', [{BIG}])"
PUT = "place.put('deep/manifest', b'new' * 1000)"
READ = f"place.read('extent', memoryview(bytearray(3 * {MIB})))"


def attempt(run_failing, folder, action, **fault):
    done = run_failing(CODE.format(action), folder, below=folder, **fault)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("action", [WRITE, PUT], ids=["write", "put"])
def test_a_write_that_fails_names_its_file(run_failing, tmp_path, call, action):
    said = attempt(run_failing, tmp_path, action, call=call)
    assert re.fullmatch(rf"OSError {errno.EIO} {tmp_path}/deep/\.?(extent|manifest)\S*", said)


@pytest.mark.parametrize("call", ["write", "sync", "rename"])
def test_a_put_that_fails_leaves_what_was_there_and_nothing_else(run_failing, tmp_path, call):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/manifest").write_bytes(b"old")
    said = attempt(run_failing, tmp_path, PUT, call=call)
    assert said.startswith(f"OSError {errno.EIO} {tmp_path}/deep/")
    assert os.listdir(tmp_path / "deep") == ["manifest"]
    assert (tmp_path / "deep/manifest").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["write", "sync", "link"])
def test_an_exclusive_put_that_fails_leaves_nothing(run_failing, tmp_path, call):
    action = PUT.replace(")", ", exclusive=True)")
    said = attempt(run_failing, tmp_path, action, call=call)
    assert said.startswith(f"OSError {errno.EIO} {tmp_path}/deep/")
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("after", [0, MIB + 1, 3 * MIB - 1])
def test_a_disk_that_fills_up_while_a_file_is_written(run_failing, tmp_path, after):
    said = attempt(run_failing, tmp_path, WRITE, call="write", error=errno.ENOSPC, after=after)
    assert said == f"OSError {errno.ENOSPC} {tmp_path}/deep/extent"
    assert (tmp_path / "deep/extent").stat().st_size == after


@pytest.mark.parametrize("after", [0, 1500, 2999])
def test_a_disk_that_fills_up_while_a_file_is_put(run_failing, tmp_path, after):
    said = attempt(run_failing, tmp_path, PUT, call="write", error=errno.ENOSPC, after=after)
    assert said.startswith(f"OSError {errno.ENOSPC} {tmp_path}/deep/.manifest")
    assert os.listdir(tmp_path / "deep") == []


def test_a_disk_with_just_enough_room(run_failing, tmp_path):
    fault = {"call": "write", "error": errno.ENOSPC, "after": 3000}
    assert attempt(run_failing, tmp_path, PUT, **fault) == "no error"
    assert (tmp_path / "deep/manifest").read_bytes() == b"new" * 1000


@pytest.mark.parametrize("fault", [{"at": 1}, {"at": 2}, {"after": 2 * MIB + 7}], ids=str)
def test_a_read_that_fails_names_its_file(run_failing, tmp_path, fault):
    (tmp_path / "extent").write_bytes(bytes(3 * MIB))
    said = attempt(run_failing, tmp_path, READ, call="read", **fault)
    assert said == f"OSError {errno.EIO} {tmp_path}/extent"


def test_get_of_a_file_that_cannot_be_read_names_it(run_failing, tmp_path):
    (tmp_path / "extent").write_bytes(b"x")
    said = attempt(run_failing, tmp_path, "place.get('extent')", call="read")
    assert said == f"OSError {errno.EIO} {tmp_path}/extent"


def test_a_rename_that_fails_leaves_the_folder_where_it_was(run_failing, tmp_path):
    (tmp_path / "step.tmp").mkdir()
    (tmp_path / "step.tmp/a").write_bytes(b"x")
    said = attempt(run_failing, tmp_path, "place.rename('step.tmp', 'step')", call="rename")
    assert said.startswith(f"OSError {errno.EIO} {tmp_path}/step.tmp")
    assert os.listdir(tmp_path) == ["step.tmp"]


def test_a_rename_whose_answer_is_lost_counts(run_failing, tmp_path):
    (tmp_path / "step.tmp").mkdir()
    action = "place.rename('step.tmp', 'step')"
    assert attempt(run_failing, tmp_path, action, call="rename", late=True) == "no error"
    assert os.listdir(tmp_path) == ["step"]


def test_one_failure_and_then_success(run_failing, tmp_path):
    """Trying again after a fault that went away writes the whole file."""
    action = f"\n    try: {WRITE}\n    except OSError: pass\n    {WRITE}"
    assert attempt(run_failing, tmp_path, action, call="write", at=2, times=1) == "no error"
    assert (tmp_path / "deep/extent").read_bytes() == bytes(3 * MIB)


def test_other_folders_do_not_fail(run_failing, tmp_path):
    (tmp_path / "bad").mkdir()
    done = run_failing(CODE.format(WRITE), tmp_path / "badly", below=tmp_path / "bad", call="write")
    assert done.stdout == "no error\n", done.stderr


def test_a_real_disk_that_is_full(small_disk):
    place = storage.open(small_disk)
    place.write("first", [memoryview(bytes(3 * MIB))])
    with pytest.raises(OSError, match="No space left") as error:
        place.write("second", [memoryview(bytes(3 * MIB))])
    assert error.value.filename == str(small_disk / "second")
    with pytest.raises(OSError, match="No space left"):
        place.put("manifest", b"x")
    assert place.names("") == ["first", "second"]
    place.remove("second")
    place.put("manifest", b"x")
    assert place.get("manifest") == b"x"


@pytest.mark.parametrize("exclusive", [False, True])
def test_puts_of_one_name_at_once_do_not_meet(tmp_path, exclusive):
    """Here threads; on a shared file system also hosts whose processes happen to have one id."""
    together = threading.Barrier(8)

    def put(thread):
        place = storage.open(tmp_path)
        together.wait()
        try:
            return place.put("manifest", bytes([thread]) * 100_000, exclusive=exclusive)
        except FileExistsError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        lost = [error for error in pool.map(put, range(8)) if error is not None]
    assert len(lost) == (7 if exclusive else 0)
    assert os.listdir(tmp_path) == ["manifest"]
    content = (tmp_path / "manifest").read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
