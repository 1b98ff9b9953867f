import json

from whalejax.bench import expert, report, timing


def test_prints_a_row_of_each_and_a_prediction_for_every_published_setting(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(report, "measure", lambda found, **_: timing.measure(found, calls=1))
    monkeypatch.setattr(expert, "Sizes", lambda: expert.SMALL)
    monkeypatch.setattr(expert, "DEEPEP", expert.DEEPEP[:2])
    out = tmp_path / "rows.jsonl"
    expert.main(["--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["op"] for row in rows[2:]] == ["plan", "permute", "unpermute"] * 2 + ["quantise"]
    assert all(row["worst_row_error"] < 0.01 for row in rows if row["op"] == "unpermute")
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:2] for line in lines] == [
        ["EP8", "dispatch"], ["EP8", "combine"], ["EP16", "dispatch"], ["EP16", "combine"],
    ]  # fmt: skip
