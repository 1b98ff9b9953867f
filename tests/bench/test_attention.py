import json
import sys

from whalejax.bench import attention
from whalejax.kernels.attention.cases import Case


def test_prints_a_line_per_row_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(attention, "SMALL_BENCHMARK_CASES", (Case(length=20, batch=2),))
    monkeypatch.setattr(sys, "argv", ["attention", "--small", "--repeats", "2"])
    attention.main()
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["op"], row["implementation"]) for row in rows] == [
        (op, name)
        for op in ("attention", "attention and gradients")
        for name in ("chunked", "reference")
    ]
    for row in rows:
        assert row["median_us"] > 0 and row["worst_row_error"] < 1e-5
        assert {"spread_us", "tflops", "timer", "device", "versions", "command"} <= row.keys()
    assert "'cudnn' cannot run: cuDNN takes bfloat16" in printed.err


def test_a_wrong_row_shows_among_right_ones():
    case = Case(length=20, batch=2)
    arrays = attention.draw(case, attention.jax.random.key(0))
    out, _ = attention.expected(case, arrays)
    wrong = out.copy()
    wrong[1, 7, 0] = 0
    for relative_to in ("row", "largest row"):
        assert attention.worst_row_error(out, out, relative_to=relative_to) == 0
    assert attention.worst_row_error(wrong, out, relative_to="row") == 1
