import json

import pytest

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
