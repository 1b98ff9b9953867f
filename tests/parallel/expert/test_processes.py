"""The same over processes, which have collectives of their own."""

import json
from pathlib import Path

RANKS = 2


def test_two_processes_compute_what_one_device_does(in_processes):
    processes = in_processes(Path(__file__).parent / "on_ranks.py", RANKS, devices=1)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, ends
    rows = [json.loads(line) for line in ends[0][0].splitlines() if line.startswith("{")]
    assert len(rows) == 20 and {row["ranks"] for row in rows} == {RANKS}
