import json
import os
import re
import subprocess
import sys

import pytest

from whalejax.cli import run, unboxed


def call(args, capsys):
    code = run(args)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fly"], "'fly' is no command; there are demo, train, generate, checkpoint, bench, info"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--steps", "many"], "'many'"),
        (["train", "--steps", "0"], "steps=0"),
        (["train", "--preset", "huge"], "preset 'huge' is unknown; there are tiny"),
        (["train", "--data", "no/such/file"], "no/such/file does not exist"),
        (["train", "--from", "no/such/model"], "no/such/model is not a directory"),
        (["train", "--tokenizer", "no/tokenizer.json"], "no/tokenizer.json does not exist"),
        (["generate", "--prompt", "a", "--model", "no/model"], "no/model is not a directory"),
        (["generate"], "the prompt is empty"),
        (["generate", "--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature=-1"),
        (["demo", "--steps", "1"], "steps=1"),
        (["train", "--mesh", "stage=0"], "stage=0"),
        (["train", "--mesh", "stage=4,expert=2", "--schedule", "zigzag"], "'zigzag'"),
        (["train", "--microbatches", "8"], "microbatches=8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_code_2(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(args, capsys)
    assert code == 2
    assert err.startswith("whalejax: ") and err.count("\n") == 1 and says in err
    assert not re.search("[╭│─]|--- |Perhaps", err), "more is left than the flags' error"
    assert out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "the corpus is empty"), (b"short", "too few"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_a_corpus_that_cannot_train_writes_nothing(content, says, capsys, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    args = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    code, _, err = call(args, capsys)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_trains_through_a_pipeline_and_goes_on(capsys, tmp_path):
    """The demo's model with all defaults: 8 microbatches of 2 sequences."""
    (tmp_path / "text.txt").write_text("a whale swims under a cold sea\n" * 40)
    args = ["train", "--mesh", "stage=4,expert=2", "--schedule", "dualpipe", "--steps", "2"]
    args += ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--length", "16"]
    args += ["--log-every", "1", "--no-export"]
    assert call([*args, "--stop-at", "1"], capsys)[0] == 0
    code, out, _ = call(args, capsys)
    assert code == 0 and "resuming from step 1" in out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert "loss" in lines[1] and lines[2]["heldout_loss"] == pytest.approx(5.5, abs=0.5)


def test_debug_prints_the_traceback(capsys):
    code, _, err = call(["train", "--data", "no/such/file", "--debug"], capsys)
    assert code == 2 and "Traceback" in err and "FileNotFoundError" in err


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["whalejax.cli"].COMMANDS, "info", interrupted)
    assert call(["info"], capsys) == (130, "", "whalejax: interrupted\n")


@pytest.mark.parametrize("command", ["demo", "train", "generate", "info"])
def test_help_of_every_command(command, capsys):
    code, out, _ = call([command, "--help"], capsys)
    assert code == 0 and f"usage: whalejax {command}" in out


def test_help_lists_the_commands(capsys):
    code, out, _ = call(["--help"], capsys)
    assert code == 0
    assert all(name in out for name in ("demo", "train", "generate", "info"))
    assert call([], capsys)[0] == 2


def test_info_names_every_op_and_why_not(capsys):
    code, out, _ = call(["info"], capsys)
    assert code == 0
    assert "cudnn" in out and "chunked" in out and "no:" in out and "jax" in out


def test_python_m_whalejax_is_the_command():
    done = subprocess.run([sys.executable, "-m", "whalejax", "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and "'fly' is no command" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "╭─ Error ─╮\n│ wrong:  │\n│ --x 3   │\n│ ─────── │\n│ hint    │\n╰─────────╯\n",
        "╭─ Error ─╮\n│ wrong:  │\n│ --x 3   │\n╰─────────╯\n",
        " Error   \n ------- \n  wrong: \n  --x 3  \n  -------\n  hint   \n         \n",
    ],
    ids=["UTF-8", "without hints", "ASCII"],
)
def test_unboxed_takes_the_message_and_not_the_hints(text):
    assert unboxed(text) == "wrong: --x 3"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_flag_is_one_line_in_every_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "whalejax", "info", "--stepz"],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == ("whalejax: Unrecognized options: --stepz (see whalejax info --help)\n")
