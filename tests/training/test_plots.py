import json

import numpy as np
import pytest

from whalejax.training import plots
from whalejax.training.plots import plot_expert_load, plot_loss


@pytest.fixture
def metrics(tmp_path):
    lines = [
        {"step": s, "loss_main": 5 / s, "loss_mtp": 6 / s,
         "expert_load": [[0.4, 0.3, 0.2, 0.1], [0.25] * 4]}
        for s in range(1, 30)
    ]  # fmt: skip
    lines.append({"step": 30, "heldout_loss": 0.3})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("draw", [plot_loss, plot_expert_load])
def test_a_picture_is_drawn(metrics, tmp_path, draw):
    png = tmp_path / "a.png"
    draw(metrics, png)
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_steps_that_were_skipped_leave_a_gap(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss_main": NaN}\n{"step": 2, "loss_main": 1.0}\n')
    plot_loss(path, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_the_picture_shows_the_numbers(metrics, tmp_path):
    """Other numbers, another picture: nothing is drawn from habit."""
    plot_loss(metrics, tmp_path / "a.png")
    plot_expert_load(metrics, tmp_path / "b.png")
    text = metrics.read_text().replace("0.4, 0.3", "0.3, 0.4").replace('"heldout_loss": 0.3', "")
    metrics.write_text(text.replace('"step": 30, ', '"step": 30'))
    plot_loss(metrics, tmp_path / "c.png")
    plot_expert_load(metrics, tmp_path / "d.png")
    for before, after in ("ac", "bd"):
        pictures = [(tmp_path / f"{name}.png").read_bytes() for name in (before, after)]
        assert pictures[0] != pictures[1]


def rebalanced(even):
    """Ranks of four experts whose busiest moves away at steps 10 and 11, and again at step 20."""
    lines = []
    for step in range(1, 30):
        rank_load = [[0.8, 0.2], [0.5, 0.5]] if step <= 11 else [[even, 1 - even], [0.5, 0.5]]
        load = [[0.4, 0.4, 0.1, 0.1], [0.25] * 4]
        lines.append({"step": step, "expert_load": load, "rank_load": rank_load})
    moved = [{"step": s, "planned_at": s // 10 * 8, "migrated_slots": 2} for s in (10, 11, 20)]
    return lines[:9] + moved[:1] + lines[9:] + moved[1:]


def test_ranks_before_and_after_are_means_around_the_first_plan():
    lines = rebalanced(0.6)
    ranked = [line for line in lines if "rank_load" in line]
    moves = [line for line in lines if "migrated_slots" in line]
    before, after = plots._first_rebalance(ranked, moves)
    np.testing.assert_allclose(before, [[0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_allclose(after, [[0.6, 0.4], [0.5, 0.5]])
    assert plots._first_rebalance(ranked, []) is None
    assert plots._first_rebalance(ranked[11:], moves) is None


def test_the_picture_of_a_balanced_run_shows_its_ranks(tmp_path):
    pictures = []
    for even in (0.6, 0.5):
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rebalanced(even)))
        plot_expert_load(tmp_path / "m.jsonl", tmp_path / "a.png")
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_nothing_measured_is_nothing_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    plot_loss(path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_dense_model_has_no_load_to_draw(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "expert_load": []}\n')
    plot_expert_load(path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
