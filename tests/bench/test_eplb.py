import json

import numpy as np
import pytest

from whalejax.bench import eplb
from whalejax.bench.eplb import POLICIES, Case, Schedule, balancedness, replay, synthetic

SCHEDULE = Schedule(every=5, max_moves=2)


def case_of(kind, steps=30):
    loads = synthetic(kind, steps, layers=3, experts=16)
    return Case(name=kind, loads=loads, replicas=24, groups=4, nodes=2, gpus=4, expert_parameters=7)


@pytest.fixture(scope="module", params=["walk", "sudden"])
def replays(request):
    case = case_of(request.param)
    return case, {policy: replay(case, policy, SCHEDULE) for policy in POLICIES}


def test_every_step_is_balanced_more_than_not_at_all_and_at_most_perfectly(replays):
    case, found = replays
    for policy, this in found.items():
        assert this.balancedness.shape == (30,)
        assert (this.balancedness > 1 / case.gpus).all() and (this.balancedness <= 1).all(), policy


def test_plans_come_when_they_should(replays):
    _, found = replays
    plans = {policy: len(this.moves) for policy, this in found.items()}
    assert plans == dict(zip(POLICIES, (0, 1, 6, 6, 6), strict=True))
    assert all(len(this.plan_ms) == len(this.moves) for this in found.values())


def test_few_moves_are_no_more_than_that(replays):
    _, found = replays
    moves = found["whale, few moves"].moves[1:]
    assert moves.max() <= SCHEDULE.max_moves < found["published"].moves[1:].max()
    assert moves.sum() > 0
    assert moves.sum() <= found["whale"].moves[1:].sum() <= found["published"].moves[1:].sum()


def test_a_plan_that_is_made_anew_outlives_a_change_that_a_static_one_does_not():
    case = case_of("sudden", 60)
    last = {p: replay(case, p, SCHEDULE).balancedness[-5:].mean() for p in POLICIES}
    assert last["static"] + 0.04 < min(last["published"], last["whale"])
    assert last["static"] + 0.02 < last["whale, few moves"]
    assert last["published"] <= last["whale"] + 0.01


def test_a_plan_sees_only_the_past():
    """Loads after the last plan change no plan, and so no move."""
    case = case_of("walk")
    loads = case.loads.copy()
    loads[20:] = loads[20:, :, ::-1]
    moves = [
        replay(Case(**(vars(case) | {"loads": x})), "whale", SCHEDULE).moves[:4]
        for x in (case.loads, loads)
    ]
    np.testing.assert_array_equal(*moves)


def test_balancedness_is_the_mean_over_the_largest():
    load = np.array([[4.0, 2, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    slots = np.tile(np.arange(4), (3, 1))
    assert balancedness(load, slots, 2) == (4 / 6 + 1) / 2  # the layer without load left out


def test_synthetic_loads_keep_their_distribution_or_change_once():
    walk, sudden = (synthetic(kind, 40, layers=8, experts=64) for kind in ("walk", "sudden"))
    assert walk.shape == (40, 8, 64)
    np.testing.assert_allclose(walk.sum(axis=2), eplb.TOKENS * 8, rtol=0.01)
    logs = np.log(walk / walk.mean(axis=2, keepdims=True))
    np.testing.assert_allclose(logs.std(axis=2).mean(axis=1), eplb.DEVIATION, rtol=0.15)
    steady, changes = (np.abs(np.diff(np.log(x), axis=0)).mean(axis=(1, 2)) for x in (walk, sudden))
    assert changes.argmax() == 19 and changes[19] > 5 * np.delete(changes, 19).max()
    assert steady.max() < 1.5 * steady.min()


def test_a_run_of_the_benchmark(tmp_path, capsys, monkeypatch):
    small = {"walk": case_of("walk", 10), "sudden": case_of("sudden", 10)}
    monkeypatch.setattr(eplb, "deepseek", lambda kind, steps: small[kind])
    lines = [
        {"step": i, "expert_load": np.random.default_rng(i).dirichlet(np.ones(8), 3).tolist()}
        for i in range(10)
    ]
    metrics, out, png = tmp_path / "metrics.jsonl", tmp_path / "rows.jsonl", tmp_path / "a.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--metrics", str(metrics), "--every", "5", "--plot", str(png), "--out", str(out)]
    eplb.main(flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == [*POLICIES] * 3
    assert rows[0]["case"] == "recorded, 3 x 8 -> 12 on 4" and rows[0]["device"].startswith("CPU")
    assert rows[2]["later_bytes"] == pytest.approx(
        rows[2]["later_moves"] * 3 * 3 * 128 * 96 * 12, rel=0.01
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-16].startswith("case")


def test_what_cannot_be_replayed_is_said(tmp_path):
    with pytest.raises(ValueError, match="policy 'best' is unknown; there are none, static"):
        replay(case_of("walk"), "best", SCHEDULE)
    with pytest.raises(ValueError, match="every=0"):
        Schedule(every=0)
    with pytest.raises(ValueError, match="a.jsonl holds no expert_load"):
        eplb.recorded(tmp_path / "a.jsonl")
