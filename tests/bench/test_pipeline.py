import json

import pytest

from whalejax.bench import expert, pipeline, report, timing


def test_prints_a_row_of_each_part_and_predicts_every_schedule(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "measure", lambda found, **_: timing.measure(found, calls=1))
    monkeypatch.setattr(pipeline, "Sizes", lambda: expert.SMALL)
    monkeypatch.setattr(pipeline, "EXPERT_RANKS", 16)
    out = tmp_path / "rows.jsonl"
    pipeline.main(["--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()][2:]
    parts = ["forward", "backward", "input", "weight", "overlapped"]
    assert [(r["op"], r["case"]) for r in rows] == [
        (part, f"layer {precision}") for precision in ("bf16", "fp8") for part in parts
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("M=")]
    assert len(lines) == 2 * len(pipeline.MICROBATCHES)
    for line in lines:
        _, *found = line.replace(",", "").split()
        assert {"gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"} <= set(found)


def test_transfers_are_bare_alone_and_hidden_where_passes_overlap():
    parts = {"forward": 100.0, "backward": 200.0, "weight": 80.0, "overlapped": 290.0}
    small = pipeline.stage_times(parts, (50.0, 60.0))
    layers = pipeline.LAYERS * 1e-6
    assert small.forward == pytest.approx(150 * layers)
    assert small.backward == pytest.approx(260 * layers)
    assert small.weight == pytest.approx(80 * layers)
    assert small.overlapped == pytest.approx(300 * layers)  # never less than both computed
    large = pipeline.stage_times(parts, (250.0, 260.0))
    assert large.overlapped == pytest.approx(510 * layers)  # what does not fit is bare


def test_weight_gradients_take_no_longer_than_the_backward_pass_whose_part_they_are():
    parts = {"forward": 100.0, "backward": 200.0, "weight": 700.0, "overlapped": 290.0}
    found = pipeline.stage_times(parts, (50.0, 60.0))
    assert found.weight == pytest.approx(200 * pipeline.LAYERS * 1e-6)
    assert found.backward == pytest.approx(260 * pipeline.LAYERS * 1e-6)  # and tokens travel
