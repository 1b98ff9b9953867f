import types

import pytest

from whalejax import progress as module
from whalejax.progress import progress, stage


@pytest.fixture(autouse=True)
def no_forced_terminal(monkeypatch):
    """rich would take the captured output for a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_a_log_gets_lines_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with progress("training", total=6, completed=1) as bar:
        for i in range(5):
            bar.advance(1, loss=1 / (i + 1))
    lines = capsys.readouterr().out.splitlines()
    # a step every 3 s, a line at most every 5 s, and one before the first step
    assert lines == [
        "training 1/6",
        "training 3/6  loss 0.5",
        "training 5/6  loss 0.25",
        "training 6/6  loss 0.2",
    ]


def test_the_last_step_is_always_shown(capsys):
    with progress("reading", total=3) as bar:
        for _ in range(3):
            bar.advance()
    assert "reading 3/3" in capsys.readouterr().out


def test_what_begins_is_said_before_the_first_step(capsys):
    with progress("compiling", total=3):
        assert capsys.readouterr().out == "compiling 0/3\n"


@pytest.mark.parametrize("title", ["loading /tmp/[/x]", "loading [bold]", "a/" * 60])
def test_a_title_is_printed_as_it_is(capsys, title):
    stage(title)
    assert f"== {title}  (" in capsys.readouterr().out


def test_a_stage_has_a_time(capsys):
    stage("exporting")
    out = capsys.readouterr().out
    assert "== exporting" in out and " s)" in out


def test_a_terminal_gets_a_live_line(monkeypatch):
    import io

    import rich.console

    screen = io.StringIO()
    console = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: console(file=screen, force_terminal=True, width=100)
    )
    with progress("training", total=4) as bar:
        for _ in range(4):
            bar.advance(1, loss=0.5)
    assert "4/4" in screen.getvalue() and "loss 0.5" in screen.getvalue()
