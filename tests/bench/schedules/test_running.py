import json
import threading

import jax.numpy as jnp
import pytest

from whalejax.bench.schedules import running as schedules

SMALL = ["--mesh", "stage=2,expert=2", "--precision", "bf16", "--length", "16", "--rounds", "1"]


WAYS = ("1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_prints_a_row_of_each_pass_and_each_schedule(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--schedules", "1f1b", "zb1p", "--microbatches", "4", "--compile-limit", "1000"]
    files = ["--out", str(out), "--profile-dir", str(tmp_path)]
    assert not schedules.main([*SMALL, *options, *files])  # nothing compiles any more
    rows = rows_of(out)
    passes = ["forward", "backward", "input", "weight", "overlapped", "transfer"]
    assert [row["op"] for row in rows] == [*passes, "step", "step"]
    assert all(row["took_ms"] > 0 for row in rows)
    first, second = rows[-2:]
    assert (first["implementation"], second["implementation"]) == ("1f1b", "zb1p")
    assert first["loss"] == pytest.approx(second["loss"], rel=schedules.TOLERANCE)
    assert all(row["lockstep_ms"] >= row["predicted_ms"] > 0 for row in (first, second))
    printed = capsys.readouterr().out
    assert printed.count("there is no plane of a GPU") == 2
    assert printed.splitlines()[-1].split()[-5] == "zb1p"


class Slow:
    """A program that compiles when it is allowed to."""

    allowed = threading.Event()

    def lower(self):
        return self

    def compile(self, compiler_options):
        assert compiler_options is None
        self.allowed.wait(60)
        raise ArithmeticError("of no more interest")


def test_what_takes_too_long_to_compile_is_reported(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(schedules, "programs_of", lambda *_: [("1f1b", Slow(), [])])
    options = ["--schedules", "1f1b", "--compile-limit", "0", "--out", str(out)]
    assert schedules.main([*SMALL, *options])  # it still compiles
    Slow.allowed.set()
    errors = {row["op"]: row["error"] for row in rows_of(out)}
    assert "not ended after 0 seconds" in errors["1f1b"]
    assert "no prediction without backward" in errors["passes"]


def make(tmp_path, *options):
    args = [*SMALL, "--profile-dir", str(tmp_path), *options]
    bench = schedules.Bench("schedules", schedules.read_arguments(args), args)
    return bench, schedules.make_case(bench.arguments, "stage=2,expert=2", "bf16")


def test_a_schedule_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    bench, case = make(tmp_path, "--schedules", *WAYS)
    found = {
        "1f1b": (5.5, 2.0, 0),
        "zb1p": (5.5, 2.1, 0),
        "dualpipe": (5.5, float("nan"), 0),
        "dualpipev": (5.51, 2.01, 0),
        "interleaved": (5.5, 2.0, 1),  # a choice of an expert was left out
    }
    programs = {
        name: lambda *_, values=values: [jnp.float32(value) for value in values]
        for name, values in found.items()
    }
    timed = []
    monkeypatch.setattr(schedules, "time_schedule", lambda *a: timed.append(a[2]))
    schedules.time_steps(bench, case, programs, (), None)
    assert timed == ["1f1b", "dualpipev"]
    assert [row["op"] for row in bench.rows] == ["zb1p", "dualpipe", "interleaved"]
    assert all("gradient's norm" in row["error"] for row in bench.rows)


@pytest.mark.parametrize(
    ("devices", "meshes"),
    [
        (8, ["stage=4,expert=2"]),
        (4, ["stage=4", "stage=2,expert=2"]),
        (2, ["stage=2"]),
        (5, ["stage=5"]),
    ],
)
def test_meshes_have_two_ranks_of_experts_where_they_can(devices, meshes):
    assert schedules.default_meshes(devices) == meshes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "3"], "--layers 3 must be a multiple of 2"),
        (["--mesh", "expert=2"], "at least 2 ranks of 'stage'"),
    ],
)
def test_what_cannot_be_timed_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        schedules.main(["--profile-dir", str(tmp_path), *options])
