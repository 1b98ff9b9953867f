import json

import numpy as np

from whalejax.bench import storage


def test_times_everyone_on_both_places_and_compares_what_was_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "PAUSE_S", 0)
    out = tmp_path / "rows.jsonl"
    places = [f"--{name}={tmp_path / name}" for name in storage.PLACES]
    for name in storage.PLACES:
        (tmp_path / name).mkdir()
    storage.main(["--mib", "2", "--arrays", "4", "--rounds", "1", "--out", str(out), *places])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["op"], r["implementation"]) for r in rows[:2]] == [
        ("copy", "memcpy, 4 threads"),
        ("checksums", "CRC32C and XXH3, 1 thread"),
    ]
    for case in storage.PLACES:
        found = [r for r in rows if r["case"] == case]
        assert {r["implementation"] for r in found if r["op"] == "write"} == {
            "raw", "whalejax", "TensorStore", "Orbax", "Orbax uncompressed"
        }  # fmt: skip
        read = [r for r in found if r["op"].startswith("read")]
        assert len(read) == 8
        assert all(r["wrong_bytes"] == 0 for r in read)
        assert not list((tmp_path / case).iterdir())
    printed = capsys.readouterr().out
    assert "tmpfs: write " in printed and "x raw + CRC32C" in printed


def test_wrong_bytes_are_counted():
    tree = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    other = {"a": np.zeros(4, np.float32), "b": np.full(4, 2, np.float32)}
    assert storage.wrong_bytes(tree, tree) == 0
    assert storage.wrong_bytes(tree, other) == 8  # of each element two bytes differ
    assert storage.wrong_bytes(tree, None) is None
