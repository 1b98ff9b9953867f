"""Migration over all devices of one process, and over processes with collectives of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "on_ranks.py"


def check(printed, ranks):
    """Every plan moved experts between ranks, and no byte was wrong."""
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(rows) == 5 and {row["ranks"] for row in rows} == {ranks}
    assert all(row["experts_from_other_ranks"] > 0 == row["wrong_bytes"] for row in rows), rows
    assert all(row["unequal_bytes_of_replicas"] == 0 for row in rows), rows


def test_one_process_moves_experts_between_its_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    run = [sys.executable, SCRIPT]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout, 4)


def test_two_processes_move_experts_between_them(in_processes):
    processes = in_processes(SCRIPT, 2, devices=1)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    check(ends[0][0], 2)
