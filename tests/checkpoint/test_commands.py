import json
import shutil

import numpy as np
import pytest

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.commands import in_units
from whalejax.checkpoint.manifest import seal, unseal
from whalejax.cli import run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    store = CheckpointStore(folder / "checkpoints", extent_bytes=4096)
    tree = {"w": np.arange(3000, dtype=np.float32), "[b]": np.zeros(3, np.int8), "n": 1}
    store.save(1, tree, metadata={"loss": 0.5}, block=True)
    store.save(20, {**tree, "n": 2}, block=True)
    shutil.copytree(folder / "checkpoints/1", folder / "checkpoints/7.saving")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """Of a run, with the checkpoints of steps 1 and 20 and an unfinished one."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.fixture
def call(capsys):
    def call(*args):
        code = run(["checkpoint", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def lines(text):
    """The cells of a table's rows, and other lines."""
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines()]
    return [row for row in rows if not set(row[0]) & set("━┏┡┗─└")]


def test_ls(folder, call):
    for path in (folder, folder / "checkpoints", f"{folder}/"):
        code, out, err = call("ls", path)
        assert (code, err) == (0, "")
        header, first, second, unfinished = lines(out)
        assert first[0] == "1" and first[2:] == ["11.7 KiB", "2", ""] and first[1].startswith("20")
        assert second[0] == "20"
        assert unfinished == ["7.saving", "", "", "", "unfinished, 7 files"]


def test_ls_tells_of_damaged_and_foreign_manifests(folder, call):
    flip(folder / "checkpoints/1/manifest.json", 1500)
    path = folder / "checkpoints/20/manifest.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "") | {"format": "[red]foreign"}))
    code, out, _ = call("ls", folder)
    _, first, second, _ = lines(out)
    assert code == 0 and first[2] == "11.7 KiB" and "bit 4 of byte 187 is flipped" in first[4]
    assert second[1:4] == ["?"] * 3 and "is [red]foreign of version 1" in second[4]


def test_inspect(folder, call):
    code, out, _ = call("inspect", folder, 1)
    title, _, array, other, *rest = lines(out)
    assert code == 0 and title[0].startswith("step 1, created 20")
    assert array == ["%5Bb%5D", "int8", "[3]", "1", "3 B"]
    assert other == ["w", "float32", "[3000]", "3", "11.7 KiB"]
    assert rest == [["n: 1"], ['metadata: {"loss": 0.5}']]
    assert lines(call("inspect", folder)[1])[0][0].startswith("step 20, ")


def test_inspect_as_json(folder, call):
    code, out, _ = call("inspect", folder, 1, "--json")
    found = json.loads(out)
    assert code == 0 and (found["step"], found["bytes"], found["values"]) == (1, 12003, {"n": 1})
    assert found["metadata"] == {"loss": 0.5}
    assert found["arrays"][1] == {
        "name": "w", "shape": [3000], "dtype": "float32", "key": None, "chunk": [1000],
        "extents": 3, "bytes": 12000,
    }  # fmt: skip


def test_verify_finds_nothing(folder, call):
    code, out, err = call("verify", folder)
    assert (code, err) == (0, "")
    assert "verifying step 1, files 6/6" in out and "verifying step 20, files 6/6" in out
    assert "step 1: 11.7 KiB, as written\n" in out
    assert "step 20" not in call("verify", folder, 1)[1]


def test_verify_finds_and_mends(folder, call):
    before = files(folder)
    flip(folder / "checkpoints/1/arrays/w/c/2", 8 * 40 + 6)
    code, out, err = call("verify", folder, 1)
    assert (code, err) == (1, "")
    assert "step 1: arrays/w/c/2 (array w, extent (2,)): CRC32C" in out
    assert "bit 6 of byte 40 is flipped (confirmed): element [2010] is" in out
    assert "step 1: 11.7 KiB, 1 faults, 0 of them mended\n" in out
    code, out, _ = call("verify", folder, "--repair")
    assert code == 0 and " -- mended\n" in out and "1 faults, 1 of them mended" in out
    after = files(folder)
    assert len(after.keys() - before.keys()) == 1
    assert before.items() <= after.items() and call("verify", folder)[0] == 0


def test_verify_ends_with_1_where_it_cannot_mend(folder, call):
    flip(folder / "checkpoints/1/arrays/w/c/2", 3)
    (folder / "checkpoints/20/arrays/w/c/0").unlink()
    code, out, _ = call("verify", folder, "--repair")
    assert code == 1 and "step 20: arrays/w/c/0 (array w, extent (0,)): is missing\n" in out


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023486, "999 KiB"),
        (1023488, "0.976 MiB"),
        (3 * 2**30, "3 GiB"),
        (500 * 2**40, "500 TiB"),
        (2000 * 2**40, "2e+03 TiB"),
    ],
)
def test_sizes_have_units(nbytes, text):
    assert in_units(nbytes) == text


def test_diff(folder, call):
    code, out, _ = call("diff", folder, 1, 20)
    assert code == 0
    assert out.splitlines()[:2] == ["n: 1 became 2", "metadata: {'loss': 0.5} became None"]


def test_rm(folder, call):
    code, out, _ = call("rm", folder, 1, 1)
    assert (code, out) == (0, "deleted step 1, freed: 11.7 KiB\n")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["20", "7.saving"]
    code, out, _ = call("rm", folder, "--unfinished")
    assert (code, out) == (0, "deleted 7.saving, files: 7\n")
    code, out, _ = call("rm", folder, 20, "--force")
    assert code == 0 and not list((folder / "checkpoints").iterdir())


def test_rm_of_a_step_whose_manifest_is_damaged(folder, call):
    (folder / "checkpoints/1/manifest.json").write_bytes(b"?")
    code, out, _ = call("rm", folder, 1)
    assert code == 0 and out.startswith("deleted step 1, freed: unknown (manifest.json: its check")
    assert not (folder / "checkpoints/1").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "no command was given; there are ls, inspect, verify, diff, rm"),
        (["fly"], "'fly' is no command for checkpoints; there are ls"),
        (["ls"], "PATH"),
        (["ls", "no/such"], "no/such holds no checkpoints, nor does checkpoints below it"),
        (["ls", "run", "--al"], "--al"),
        (["inspect", "run", "3"], "has no checkpoint of step 3; its steps: 1, 20"),
        (["inspect", "run", "x"], "'x'"),
        (["verify", "run", "1", "3", "4"], "no checkpoint of step 3, 4; its steps: 1, 20"),
        (["diff", "run", "1"], "STEP the second step"),
        (["diff", "run", "1", "3"], "no checkpoint of step 3"),
        (["rm", "run"], "name steps of"),
        (["rm", "run", "20"], "step 20 is the newest of"),
        (["rm", "run", "1", "20", "--unfinished"], "step 20 is the newest of"),
        (["rm", "run", "1", "3", "--unfinished", "--force"], "no checkpoint of step 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_changes_nothing(args, says, folder, call, monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = files(folder)
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert err.startswith("whalejax: ") and err.count("\n") == 1 and says in err
    assert files(folder) == before and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_run_in_an_object_store(kind, call, request):
    url = "memory://commands/run" if kind == "memory" else request.getfixturevalue("s3_url")
    base, mark, options = url.partition("?")
    store = CheckpointStore(f"{base}/checkpoints{mark}{options}")
    store.save(1, {"w": np.arange(3000, dtype=np.float32)}, block=True)
    store.place.put("2/arrays/w/c/0", b"begun")
    for given in (url, store.place.url):
        assert [row[0] for row in lines(call("ls", given)[1])[1:]] == ["1", "2"]
    data = bytearray(store.place.get("1/arrays/w/c/0"))
    data[9] ^= 1
    store.place.put("1/arrays/w/c/0", bytes(data))
    assert call("verify", url)[0] == 1
    assert call("verify", url, "--repair")[0] == 0
    assert call("rm", url, "--unfinished")[1] == "deleted 2, files: 1\n"
    code, _, err = call("rm", url, 1)
    assert code == 2 and "step 1 is the newest" in err
    assert call("rm", url, 1, "--force")[0] == 0 and store.place.names("") == []


def test_nothing_complete_is_one_line(folder, call):
    shutil.rmtree(folder / "checkpoints/1")
    shutil.rmtree(folder / "checkpoints/20")
    assert lines(call("ls", folder)[1])[1][0] == "7.saving"
    code, _, err = call("inspect", folder)
    assert code == 2 and err.endswith("holds no complete checkpoint\n")


@pytest.mark.parametrize("command", ["", "ls", "inspect", "verify", "diff", "rm"])
def test_help(command, call):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0 and f"whalejax checkpoint {command}" in out
