"""What `whalejax info` says of storage."""

import os
import shutil

import pytest

from whalejax.cli import run
from whalejax.info import storage_lines
from whalejax.storage import threefs


def folder_of_3fs(root):
    for name in threefs.VIRTUAL_FOLDERS:
        (root / "3fs-virt" / name).mkdir(parents=True)
    (root / "3fs-virt/get-conf/usr.readonly").symlink_to("true")
    return root


def test_a_disk_is_named_with_its_file_system(tmp_path):
    place, system, schemes = storage_lines(tmp_path / "not/yet")
    assert place == f"storage: {tmp_path}/not/yet: disk"
    assert " at /" in system
    said = float(system.split(", ")[-1].removesuffix(" GiB free"))
    assert said == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, abs=2)
    assert schemes.startswith("  opens paths, 3fs://")
    assert not (tmp_path / "not").exists()


def test_3fs_is_named_with_what_it_can_do(tmp_path):
    place, _, abilities, title, *advice, _ = storage_lines(f"3fs://{folder_of_3fs(tmp_path)}/run")
    assert place == f"storage: {tmp_path}/run: 3fs"
    assert abilities == (
        "  deletes trees on the servers (rm-rf): yes, USRBIO: yes, usr.readonly=true"
    )
    assert title == "  lay it out for checkpoints with"
    assert any("mkdir" in line and "--chunk-size 16384KB" in line for line in advice)


def test_the_command_describes_the_path_it_is_given(tmp_path, capsys, monkeypatch):
    assert run(["info", "--path", str(folder_of_3fs(tmp_path))]) == 0
    assert f"storage: {tmp_path}: 3fs" in capsys.readouterr().out
    os.rename(tmp_path / "3fs-virt", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert run(["info"]) == 0
    assert f"storage: {tmp_path}: disk" in capsys.readouterr().out


def test_the_command_refuses_3fs_where_there_is_none(tmp_path, capsys):
    assert run(["info", "--path", f"3fs://{tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "lies on no 3FS mount" in err
