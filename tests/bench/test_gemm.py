import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.bench import gemm, report, timing
from whalejax.kernels.fp8_gemm.cases import LAYERS, Case, random_cases


def rows_of(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], lines


def test_prints_a_row_of_each_and_a_table_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gemm, "SMALL", (Case(m=8, n=24, k=48),))
    monkeypatch.setattr(report, "measure", lambda found, **_: timing.measure(found, calls=1))
    out = tmp_path / "rows.jsonl"
    sections = ["dense", "random", "wgrad", "kgrouped", "mlp", "masked"]
    gemm.main(["--sections", *sections, "--rounds", "1", "--out", str(out)])
    rows, lines = rows_of(capsys)
    twice = ["wgrad", "kgrouped", "mlp"]
    assert [row["op"] for row in rows] == sorted(sections + twice, key=sections.index)
    for row in rows:
        assert "--sections dense random" in row["command"]
        assert row["burst_us"] > 0 and row["sustained_us"] > 0
        assert {"timer", "device", "versions", "command", "burst_tflops"} <= row.keys()
    # XLA's float32 product rounded to bfloat16: 2^-9 a number, and less in the norm of a row
    assert 0 < rows[0]["worst_row_error"] < 2**-8
    assert rows[4]["worst_row_error"] < 2**-20  # float32
    assert lines[-1].startswith("masked") and lines[-1].endswith("TFLOP/s")
    assert out.read_text().splitlines() == [line for line in lines if line.startswith("{")]


@pytest.mark.parametrize(
    ("option", "says"),
    [(["--tune"], "it needs a CUDA GPU"), (["--rounds", "0"], "--rounds: 0 must be at least 1")],
)
def test_refuses_before_a_file_is_begun(capsys, tmp_path, option, says):
    out = tmp_path / "rows.jsonl"
    out.write_text("of another run")
    with pytest.raises(SystemExit, match="2"):
        gemm.main([*option, "--out", str(out)])
    assert says in capsys.readouterr().err and out.read_text() == "of another run"


def test_worst_row_sees_one_wrong_row():
    wanted = jnp.ones((4, 8)).at[3].set(0)
    assert report.worst_row(wanted, wanted) == 0
    assert report.worst_row(wanted.at[2, 0].set(0), wanted) == pytest.approx(8**-0.5)
    assert report.worst_row(wanted.at[3, 0].set(1), wanted) == float("inf")  # should be zero


def test_an_expert_has_the_gradients_of_swiglu():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((5, 16), (24, 16), (16, 12), (5, 16))
    x, w_gate_up, w_down, dy = (
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )

    def loss(x, w_gate_up, w_down):
        hidden = jax.nn.silu(x @ w_gate_up[:12].T) * (x @ w_gate_up[12:].T)
        return jnp.vdot(dy, hidden @ w_down.T)

    _, gradients = gemm.expert_mlp(lambda x, w: x @ w.T, x, w_gate_up, w_down, dy)
    wanted = jax.grad(loss, argnums=(0, 1, 2))(x, w_gate_up, w_down)
    for actual, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_random_shapes_are_those_that_the_kernels_take():
    found = random_cases(20)
    assert len(set(found)) == 20 and found == random_cases(20)
    for case in found:
        assert 1 <= case.m <= 8192 and case.n % 16 == case.k % 16 == 0
        assert any(abs(case.n - n) <= 128 and abs(case.k - k) <= 128 for n, k in LAYERS)


def test_candidates_take_turns_with_all_their_arguments():
    seen = []

    def candidate(name):
        return timing.Candidate(
            name, lambda i: seen.append((name, i)), [(0,), (1,)], lambda _: None
        )

    times = timing.measure([candidate("a"), candidate("b")], rounds=2, calls=3)
    turn = [0, 1, 0, 1]  # one call that is not counted, and three
    assert seen == [(name, i) for name in "abba" * 2 for i in turn]
    for measured in times.values():
        assert len(measured.burst_us) == 6
        assert measured.row()["burst_us"] > 0 and measured.row()["burst_ghz"] is None
