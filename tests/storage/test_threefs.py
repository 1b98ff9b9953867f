"""3FS mounts, against an imitation: a folder with the virtual tree, and a thread for the daemon.

The imitation has what the sources of 3FS say that a client sees. It proves that our side does what
we read there, not that 3FS does: that takes a cluster.
"""

import os
import shlex
import shutil
import threading
import time
from pathlib import Path, PurePosixPath

import pytest

from whalejax import storage
from whalejax.storage import threefs
from whalejax.storage.files import Files
from whalejax.storage.mounts import holding, mount_points

MIB = 2**20


@pytest.fixture
def mount(tmp_path):
    """The root of a 3FS mount without a daemon."""
    root = tmp_path / "hf3fs"
    for name in threefs.VIRTUAL_FOLDERS:
        (root / "3fs-virt" / name).mkdir(parents=True)
    (root / "3fs-virt/get-conf/usr.readonly").symlink_to("false")
    (root / "3fs-virt/get-conf/usr.attr_timeout").symlink_to("30")
    return root


@pytest.fixture
def daemon(mount):
    """Deletes, on a thread, what is renamed into `rm-rf`; gives the list of what it was."""
    deleted, stop = [], threading.Event()

    def run():
        while not stop.is_set():
            for path in list((mount / "3fs-virt/rm-rf").iterdir()):
                deleted.append(sorted(child.name for child in path.rglob("*")))
                shutil.rmtree(path)
            time.sleep(0.002)

    thread = threading.Thread(target=run)
    thread.start()
    yield deleted
    stop.set()
    thread.join()


@pytest.fixture
def table(tmp_path):
    """Writes a table of mounts, as Linux has it, and returns its path."""

    def write(*lines):
        path = tmp_path / "mountinfo"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def line(path, inner="/", fstype="fuse.hf3fs", source="hf3fs.stage"):
    path = str(path).replace(" ", r"\040")
    return f"36 35 98:0 {inner} {path} rw,noatime shared:1 master:2 - {fstype} {source} rw,errors=x"


def filled(folder):
    for name in ("a", "deep/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def snapshot(root):
    return sorted(path.relative_to(root) for path in root.rglob("*"))


def test_finds_the_mount_of_paths_that_exist_and_of_others(mount):
    (mount / "jobs").mkdir()
    for path in (mount, mount / "jobs", mount / "jobs/not/yet", str(mount / "jobs")):
        found = threefs.find(path)
        assert found.root == mount and found.rm_rf and found.usrbio, path
        assert found.virtual == mount / "3fs-virt"


def test_finds_the_mount_through_a_symbolic_link_and_not_by_the_links_place(mount, tmp_path):
    (tmp_path / "link").symlink_to(mount)
    (mount / "elsewhere").symlink_to(tmp_path)
    assert threefs.find(tmp_path / "link/run").root == mount
    assert threefs.find(mount / "elsewhere/run") is None


@pytest.mark.parametrize("missing", threefs.VIRTUAL_FOLDERS)
def test_a_folder_with_a_part_of_the_virtual_tree_is_no_mount(mount, missing):
    shutil.rmtree(mount / "3fs-virt" / missing)
    assert threefs.find(mount) is None


def test_a_plain_folder_is_no_mount(tmp_path):
    assert threefs.find(tmp_path) is None
    assert storage.open(tmp_path).kind == "disk"


def test_the_type_of_the_mount_is_enough_and_says_what_is_missing(tmp_path, table):
    found = threefs.find(tmp_path / "run", table=table(line("/", fstype="ext4"), line(tmp_path)))
    assert found == threefs.Mount(
        root=tmp_path, virtual=None, rm_rf=False, usrbio=False, cluster="stage"
    )
    assert threefs.settings(found) == {}


def test_without_rm_rf_the_rest_of_a_typed_mount_still_counts(mount, table):
    shutil.rmtree(mount / "3fs-virt/rm-rf")
    found = threefs.find(mount / "run", table=table(line(mount)))
    assert (found.rm_rf, found.usrbio, found.cluster) == (False, True, "stage")


def test_folders_mounted_one_by_one_share_the_virtual_folder_but_not_rm_rf(mount, table):
    """A rename from one mount to another fails, though both show the same file system."""
    (mount / "team").mkdir()
    lines = line(mount / "3fs-virt"), line(mount / "team", inner="/team")
    found = threefs.find(mount / "team/run", table=table(*lines))
    assert (found.root, found.inner) == (mount / "team", PurePosixPath("/team"))
    assert (found.rm_rf, found.usrbio) == (False, True)


def test_the_virtual_folder_of_another_cluster_is_not_taken(mount, table):
    (mount / "other").mkdir()
    lines = line(mount), line(mount / "other", source="hf3fs.prod")
    found = threefs.find(mount / "other/run", table=table(*lines))
    assert (found.cluster, found.virtual, found.usrbio) == ("prod", None, False)


def test_settings_are_the_targets_of_links(mount):
    assert threefs.settings(threefs.find(mount)) == {
        "usr.attr_timeout": "30",
        "usr.readonly": "false",
    }


def test_the_table_of_mounts_is_read_with_odd_names_and_hidden_mounts(tmp_path, table):
    odd = tmp_path / "a b\\c"
    lines = [line("/", fstype="ext4"), line(tmp_path, fstype="xfs"), line(tmp_path)]
    points = mount_points(table(*lines, line(str(odd).replace("\\", r"\134"), fstype="ext4")))
    assert holding(odd / "x", points).path == odd
    assert holding(tmp_path / "x", points).fstype == "fuse.hf3fs"  # hides xfs
    assert holding(Path("/etc"), points).fstype == "ext4"
    assert mount_points(tmp_path / "no table") == []
    assert holding(tmp_path, []) is None


def test_open_takes_both_names_of_a_place_on_3fs(mount):
    for url in (
        mount / "run",
        str(mount / "run"),
        f"3fs://{mount}/run",
        Path(f"3fs://{mount}/run"),
    ):
        place = storage.open(url)
        assert (place.kind, place.url, place.mount.root) == ("3fs", str(mount / "run"), mount)


def test_open_refuses_3fs_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/run lies on no 3FS mount.*3fs-virt") as error:
        storage.open(f"3fs://{tmp_path}/run")
    assert mounted_type(tmp_path) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_name_may_begin_like_the_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = storage.open("3fs:notes")
    assert (place.kind, place.url) == ("disk", f"{tmp_path}/3fs:notes")


def mounted_type(path):
    return holding(path, mount_points()).fstype


def test_remove_tree_has_the_servers_do_it(mount, daemon):
    filled(mount / "run/step 1")
    filled(mount / "run/step 2")
    Files(mount / "run", mount=threefs.find(mount)).remove_tree("step 1")
    assert daemon == [["a", "b", "deep"]]  # one tree, not file by file
    assert sorted(os.listdir(mount / "run")) == ["step 2"]
    assert os.listdir(mount / "3fs-virt/rm-rf") == []


def test_trees_of_one_name_get_different_names_in_rm_rf(mount, daemon, monkeypatch):
    """The kernel may still remember the first one's name when the second comes."""
    rename, targets = os.rename, []

    def record(source, target):
        targets.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", record)
    for parent in ("x", "y"):
        threefs.remove_tree(threefs.find(mount), filled(mount / parent / "step"))
    assert len(set(targets)) == len(daemon) == 2


def test_removing_what_is_not_there_is_no_error(mount, daemon):
    found = threefs.find(mount)
    threefs.remove_tree(found, mount / "run")
    threefs.remove_tree(found, mount / "no/folder")
    Files(mount / "run", mount=found).remove_tree("step")
    assert daemon == []


def test_a_folder_that_no_daemon_deletes_is_an_error(mount):
    filled(mount / "run")
    with pytest.raises(TimeoutError, match=r"still there after 0\.05 s") as error:
        threefs.remove_tree(threefs.find(mount), mount / "run", patience=0.05)
    assert Path(error.value.filename).parent == mount / "3fs-virt/rm-rf"


@pytest.mark.parametrize("name", [".", "..", "../elsewhere", "3fs-virt", "3fs-virt/iovs"])
def test_remove_tree_refuses_what_is_not_below_the_root(mount, daemon, name):
    filled(mount.parent / "elsewhere")
    before = snapshot(mount.parent)
    with pytest.raises(ValueError, match="below the root"):
        threefs.remove_tree(threefs.find(mount), mount / name)
    assert snapshot(mount.parent) == before and daemon == []


def test_remove_tree_refuses_files_and_links(mount, daemon):
    filled(mount / "run")
    (mount / "link").symlink_to(mount / "run")
    for name in ("run/a", "link"):
        with pytest.raises(NotADirectoryError, match=name):
            threefs.remove_tree(threefs.find(mount), mount / name)
    assert daemon == [] and (mount / "run/a").exists() and (mount / "link").exists()


def test_remove_tree_where_3fs_forbids_it_names_the_rule(mount, daemon, monkeypatch):
    def forbid(source, target):
        raise PermissionError(1, "Operation not permitted", str(source), None, str(target))

    filled(mount / "run")
    monkeypatch.setattr(os, "rename", forbid)
    with pytest.raises(PermissionError, match="only for its owner") as error:
        threefs.remove_tree(threefs.find(mount), mount / "run")
    assert error.value.filename == str(mount / "run") and (mount / "run/a").exists()


def test_remove_tree_whose_answer_was_lost_is_done(mount, daemon, monkeypatch):
    rename = os.rename

    def lose(source, target):
        rename(source, target)
        raise OSError(5, "Input/output error", str(source))

    monkeypatch.setattr(os, "rename", lose)
    threefs.remove_tree(threefs.find(mount), filled(mount / "run"))
    assert len(daemon) == 1 and not (mount / "run").exists()


def test_without_rm_rf_files_are_deleted_one_by_one_and_it_is_said(mount, table):
    shutil.rmtree(mount / "3fs-virt/rm-rf")
    found = threefs.find(mount, table=table(line(mount)))
    with pytest.warns(RuntimeWarning, match="offers no rm-rf.*file by file"):
        threefs.remove_tree(found, filled(mount / "run"))
    assert not (mount / "run").exists()
    threefs.remove_tree(found, mount / "run")  # gone already: no error, no warning


@pytest.mark.parametrize(
    ("extent", "chunk"),
    [(0.5, 0.5), (3, 1), (4, 4), (8, 4), (12, 4), (16, 16), (32, 16), (64, 64), (192, 64)],
)
def test_chunks_divide_extents_and_are_of_sizes_that_all_targets_take(extent, chunk):
    extent, chunk = int(extent * MIB), int(chunk * MIB)
    assert threefs.chunk_bytes(extent) == chunk
    assert extent % chunk == 0 and chunk & (chunk - 1) == 0


@pytest.mark.parametrize("extent", [0, -MIB, 65536, 5 * MIB + 1])
def test_extents_that_no_chunk_fits_are_refused(extent):
    with pytest.raises(ValueError, match=f"extent_bytes={extent}"):
        threefs.chunk_bytes(extent)


def test_advice_for_a_new_folder(mount):
    lines = threefs.advice(threefs.find(mount), mount / "team x/run", 32 * MIB, nodes=25)
    words = [shlex.split(line, comments=True) for line in lines]
    assert [word[:3] for word in words if word] == [
        ["admin_cli", "-cfg", "/opt/3fs/etc/admin_cli.toml"]
    ] * 2
    assert words[0][3] == "list-chain-tables"
    assert shlex.split(words[2][3]) == [
        "mkdir",
        "--recursive",
        "--chain-table-id",
        "<CHAIN_TABLE_ID>",
        "--chunk-size",
        "16384KB",
        "--stripe-size",
        "25",
        "/team x/run",
    ]
    assert lines[1].startswith("# replace <CHAIN_TABLE_ID>")


def test_advice_for_a_folder_that_is_there_keeps_its_chain_table(mount):
    (mount / "run").mkdir()
    lines = threefs.advice(threefs.find(mount), mount / "run", 4 * MIB)
    assert shlex.split(lines[0])[3] == "set-layout --chunk-size 4096KB --stripe-size 16 /run"
    assert not any("<" in line for line in lines)


def test_no_advice_for_a_folder_that_has_the_chunk_size(mount, monkeypatch):
    (mount / "run").mkdir()
    monkeypatch.setattr(threefs, "CHUNK_SIZES", (os.stat(mount / "run").st_blksize,))
    assert threefs.advice(threefs.find(mount), mount / "run", 4 * MIB) == []


def test_advice_names_folders_as_3fs_does(mount, table):
    found = threefs.find(mount, table=table(line(mount, inner="/users/me")))
    assert "/users/me/run" in threefs.advice(found, mount / "run", 4 * MIB)[-1]
    assert "/users/me'" in threefs.advice(found, mount, 4 * MIB)[0]


@pytest.mark.parametrize(
    ("path", "nodes", "match"), [("run", 0, "nodes=0"), ("..", 1, "not lie on")]
)
def test_advice_refuses(mount, path, nodes, match):
    with pytest.raises(ValueError, match=match):
        threefs.advice(threefs.find(mount), mount / path, 4 * MIB, nodes=nodes)
