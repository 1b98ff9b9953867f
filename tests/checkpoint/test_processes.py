"""Saving in 2 and 4 processes, one of them killed in the middle of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from whalejax.checkpoint import CheckpointStore

SCRIPT = Path(__file__).parent / "on_processes.py"
TIMEOUT_S = 5


@pytest.fixture
def run(in_processes):
    """Exit codes and what each process printed, a JSON object a line, and its errors."""

    def start(url, count, killed=-1):
        plan = json.dumps({"url": str(url), "timeout_s": TIMEOUT_S, "killed": killed})
        processes = in_processes(SCRIPT, count, plan, devices=2)
        printed = [process.communicate(timeout=120) for process in processes]
        lines = [
            [json.loads(line) for line in out.splitlines() if line[0] == "{"] for out, _ in printed
        ]
        return [process.returncode for process in processes], lines, [err for _, err in printed]

    return start


@pytest.mark.parametrize("count", [2, 4])
def test_processes_save_together_and_one_reads_it(run, tmp_path, count):
    codes, lines, errors = run(tmp_path, count)
    assert codes == [0] * count, errors
    for first, second in lines:
        assert first == {"latest": 1, "arrays": 4}
        assert second["said"] == "saved"
        assert second["right"]
        assert second["steps"] == [1, 2]
    assert lines[0][1]["reports_left"] == 0  # of what only the first process reads
    tree = CheckpointStore(tmp_path).restore(2)
    wanted = np.arange(64 * 48, dtype=np.float32).reshape(64, 48) + 2
    for name in ("both", "one", "none"):
        np.testing.assert_array_equal(tree[name], wanted)
    assert tree["step"] == 2
    assert not list(tmp_path.rglob("parts/*"))  # nothing but what the manifest names


@pytest.mark.parametrize(("count", "killed"), [(2, 1), (4, 2)])
def test_the_others_name_the_process_that_was_killed(run, tmp_path, count, killed):
    codes, lines, errors = run(tmp_path, count, killed)
    assert codes == [-9 if number == killed else 3 for number in range(count)], errors
    for number, printed in enumerate(lines):
        if number == killed:
            continue
        last = printed[-1]
        assert f"process {killed} of {count}" in last["said"]
        assert "no sign of life for 5 s" in last["said"]
        assert last["seconds"] < 2 * TIMEOUT_S + 5
        assert last["right"]
        assert last["steps"] == [1]
        assert not last["complete"]


def test_the_others_end_where_the_first_process_is_killed(run, tmp_path):
    codes, lines, errors = run(tmp_path, 2, killed=0)
    assert codes[0] == -9
    assert codes[1] != 0, lines
    told = json.dumps(lines[1]) + errors[1]  # JAX may end it before it can speak
    assert "process 0" in told or "coordination service" in told.lower(), told
    assert CheckpointStore(tmp_path).steps() == [1]
