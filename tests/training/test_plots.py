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


def test_a_dense_model_has_no_load_to_draw(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "expert_load": []}\n')
    plot_expert_load(path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
