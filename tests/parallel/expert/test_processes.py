"""The same over processes, which have collectives of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_compute_what_one_device_does():
    script, port = Path(__file__).parent / "on_ranks.py", str(free_port())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(RANKS), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(RANKS)
    ]
    try:
        ends = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, ends
    rows = [json.loads(line) for line in ends[0][0].splitlines() if line.startswith("{")]
    assert len(rows) == 16 and {row["ranks"] for row in rows} == {RANKS}
