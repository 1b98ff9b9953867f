"""Whole checkpoints on disks that are full or broken: a clear error, and nothing lost."""

import errno
import json

import numpy as np
import pytest

from whalejax.checkpoint import CheckpointStore

SAVES = """
import json, sys
import numpy as np
from whalejax.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1], extent_bytes=2**16)
said = []
for step in range(6):
    tree = {f"w{i}": np.random.default_rng([step, i]).random((64, 256)) for i in range(8)}
    try:
        store.save(step, tree)
        store.wait()
        said.append("")
    except OSError as error:
        said.append(str(error))
print(json.dumps(said))
"""
MIB = 2**20  # of the arrays of a step


def tree(step):
    return {f"w{i}": np.random.default_rng([step, i]).random((64, 256)) for i in range(8)}


def saved(run_failing, folder, **fault):
    """What each of six saves said, under a fault; nothing if it succeeded."""
    folder.mkdir(exist_ok=True)
    done = run_failing(SAVES, folder, below=folder, **fault)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(folder, said):
    """Every save that did not fail restores bit for bit, and no other is there."""
    store = CheckpointStore(folder)
    assert store.steps() == [step for step, error in enumerate(said) if not error]
    for step in store.steps():
        found = store.restore(step)
        assert all((found[name] == leaf).all() for name, leaf in tree(step).items())


@pytest.mark.parametrize("call", ["write", "sync", "rename"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_save_that_fails_is_told_and_the_next_succeeds(run_failing, tmp_path, call, code):
    at = {"write": 60, "sync": 75, "rename": 3}[call]
    said = saved(run_failing, tmp_path / "store", call=call, error=code, at=at, times=1)
    failed = [error for error in said if error]
    assert len(failed) == 1
    assert said[0] == said[-1] == ""
    assert str(tmp_path / "store") in failed[0]
    check(tmp_path / "store", said)
    assert not CheckpointStore(tmp_path / "store").unfinished()


def test_a_full_disk_fails_all_later_saves_and_leaves_those_before(run_failing, tmp_path):
    folder = tmp_path / "store"
    said = saved(run_failing, folder, call="write", error=errno.ENOSPC, after=int(2.5 * MIB))
    assert [bool(error) for error in said] == [False, False, True, True, True, True]
    assert all("No space left on device" in error for error in said[2:])
    check(folder, said)


def test_a_rename_whose_answer_is_lost_counts(run_failing, tmp_path):
    said = saved(run_failing, tmp_path / "store", call="rename", at=2, times=1, late=True)
    assert said == [""] * 6
    check(tmp_path / "store", said)


def test_a_checkpoint_that_may_not_be_durable_is_told_and_restores(run_failing, tmp_path):
    """The last fsync of a save fails: the folder is renamed, its name not yet synchronised."""
    CheckpointStore(tmp_path / "whole", extent_bytes=2**16).save(0, tree(0), block=True)
    synchronised = len(list((tmp_path / "whole/0").rglob("*"))) + 1  # each file, each folder
    folder = tmp_path / "store"
    last = synchronised + 2  # the store's folder before the rename, and after it
    said = saved(run_failing, folder, call="sync", at=last, times=1)
    assert [bool(error) for error in said] == [True, False, False, False, False, False]
    assert "Input/output error" in said[0]
    check(folder, [""] * 6)


def test_a_disk_that_cannot_be_read_is_told(run_failing, tmp_path):
    CheckpointStore(tmp_path).save(0, tree(0), block=True)
    code = """
import sys
from whalejax.checkpoint import CheckpointStore
try:
    CheckpointStore(sys.argv[1]).restore(0)
except OSError as error:
    print(error)
"""
    done = run_failing(code, tmp_path, below=tmp_path, call="read", at=4)
    assert "Input/output error" in done.stdout, done.stderr
    assert str(tmp_path / "0") in done.stdout


def test_a_small_disk_takes_what_fits(small_disk):
    """On a file system that is really full: the save that failed gives back its room."""
    store = CheckpointStore(small_disk / "store", extent_bytes=2**16)
    said = []
    for step in range(5):
        try:
            store.save(step, tree(step), block=True)
            said.append("")
        except OSError as error:
            said.append(str(error))
    assert [bool(error) for error in said] == [False, False, False, True, True]
    assert all("No space left on device" in error for error in said[3:])
    check(small_disk / "store", said)
    store.remove(0)
    store.save(5, tree(5), block=True)
    assert store.steps() == [1, 2, 5]
