import json

from whalejax.bench import mla, report, timing


def test_prints_a_row_of_each_and_a_table_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "measure", lambda found, **_: timing.measure(found, calls=1))
    out = tmp_path / "rows.jsonl"
    mla.main(["--rounds", "1", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["implementation"] for row in rows] == [
        "copy", "xla bf16", "xla", "plan", "xla", "plan"
    ]  # fmt: skip
    for row in rows:
        assert row["burst_us"] > 0 and {"timer", "device", "versions", "command"} <= row.keys()
    for row in rows[2::2]:  # in bfloat16, or rather float32 on a CPU, and of an FP8 cache
        assert row["worst_row_error"] < 1e-6 and row["burst_gbs"] >= 0
    assert lines[-1].startswith("mla_decode b2 k100 varied h4 s2 fp8") and lines[
        -1
    ].rstrip().endswith("us")
    assert out.read_text().splitlines() == [line for line in lines if line.startswith("{")]
