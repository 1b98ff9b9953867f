"""Stages in several processes, whose transfers go through collectives between them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(processes, file):
    """Starts the script in so many processes, with 8 devices in all."""
    script, port = Path(__file__).parent / "on_processes.py", str(free_port())
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // processes)}
    return [
        subprocess.Popen(
            [sys.executable, script, str(process), str(processes), port, file],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | devices,
        )
        for process in range(processes)
    ]


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    files = {processes: tmp_path / f"{processes}.npz" for processes in (1, 2)}
    started = [each for processes, file in files.items() for each in start(processes, file)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * 3, printed
    one, two = (np.load(files[processes]) for processes in (1, 2))
    assert set(one) == set(two)
    assert sum("'embedding'" in name for name in one) == 3  # of each schedule, with all others
    for name in one:
        # the processes' collectives may sum in another order
        assert np.linalg.norm(one[name] - two[name]) <= 1e-6 * np.linalg.norm(one[name]), name
    assert len({one[name].item() for name in one if name.endswith("[0][0]")}) == 1
