"""Stages in several processes, whose transfers go through collectives between them."""

from pathlib import Path

import numpy as np


def test_two_processes_give_the_loss_and_gradients_of_one(in_processes, tmp_path):
    script = Path(__file__).parent / "on_processes.py"
    files = {processes: tmp_path / f"{processes}.npz" for processes in (1, 2)}
    started = [
        process
        for count, file in files.items()
        for process in in_processes(script, count, file, devices=8 // count)
    ]
    printed = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 3, printed
    one, two = (np.load(files[processes]) for processes in (1, 2))
    assert set(one) == set(two)
    assert sum("'embedding'" in name for name in one) == 3  # of each schedule, with all others
    for name in one:
        # the processes' collectives may sum in another order
        assert np.linalg.norm(one[name] - two[name]) <= 1e-6 * np.linalg.norm(one[name]), name
    assert len({one[name].item() for name in one if name.endswith("[0][0]")}) == 1
