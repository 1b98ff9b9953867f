"""SIGKILL at random moments of saving: the last complete step always restores bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_saves.py"


def killed(url, kills, seed):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), str(url), str(kills), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_last_complete_step_restores_whenever_saving_is_killed(tmp_path, kills):
    found = killed(tmp_path / "store", kills, seed=kills)
    assert found["lost"] == found["wrong"] == []
    # else nothing was killed in the middle of a save, or no save was ever complete
    assert found["unfinished"] >= kills // 4
    assert found["saved"] >= kills // 4


def test_the_last_complete_step_restores_from_an_object_store(s3_url):
    found = killed(s3_url, 6, seed=1)
    assert found["lost"] == found["wrong"] == []
    assert found["unfinished"] >= 2
