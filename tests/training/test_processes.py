"""Training in two processes of four devices each, against one process of eight."""

import os
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.parallel.mesh import MeshConfig
from whalejax.training.metrics import read_metrics
from whalejax.training.run import TrainConfig, train
from whalejax.weights import from_pretrained, save_pretrained

PROCESSES = 2


@pytest.fixture(scope="module")
def files(micro, tmp_path_factory):
    """A text of random words, and the micro model's weights."""
    folder = tmp_path_factory.mktemp("files")
    words = random.Random(0).choices(["the", "whale", "swims", "under", "a", "cold", "sea"], k=2000)
    (folder / "words.txt").write_text(" ".join(words))
    save_pretrained(Decoder(micro, rngs=nnx.Rngs(5)), folder / "micro")
    return folder


def config(files, out):
    return TrainConfig(
        out=out,
        from_pretrained=files / "micro",
        data=files / "words.txt",
        steps=6,
        batch_size=8,
        length=16,
        save_every=3,
        log_every=1,
        mesh=MeshConfig(data=2, expert=4),
    )


def in_processes(config, *more):
    """The command line of `config` in all processes; exit codes and what they printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "whalejax", "train", "--out", config.out,
        "--from", config.from_pretrained, "--data", config.data, "--steps", config.steps,
        "--batch-size", config.batch_size, "--length", config.length,
        "--save-every", config.save_every, "--log-every", config.log_every,
        "--mesh", config.mesh, "--coordinator", f"127.0.0.1:{port}",
        "--num-processes", PROCESSES, *more,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [*map(str, command), "--process-id", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        )
        for number in range(PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def losses(out):
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def test_two_processes_train_as_one_which_goes_on_from_their_checkpoint(files, tmp_path):
    both, one = config(files, tmp_path / "both"), config(files, tmp_path / "one")
    # experts move between processes, which changes no loss
    codes, printed = in_processes(both, "--eplb.every", 2, "--eplb.delay", 1, "--eplb.redundant", 4)
    assert codes == [0] * PROCESSES, printed
    assert any("migrated_slots" in line for line in read_metrics(both.out / "metrics.jsonl"))
    train(one)
    assert losses(both.out)[0] == losses(one.out)[0] == [1, 2, 3, 4, 5, 6]  # one writes
    np.testing.assert_allclose(losses(both.out)[1], losses(one.out)[1], rtol=1e-5)
    assert "training 6/6" in printed[0]
    assert "training" not in printed[1] and "exporting" not in printed[1]
    assert (both.out / "loss.png").exists() and (both.out / "expert_load.png").exists()
    ours, theirs = (nnx.state(from_pretrained(c.out / "model")) for c in (both, one))
    for a, b in zip(*map(nnx.to_flat_state, (ours, theirs)), strict=True):
        assert a[0] == b[0]
        # Adam moves what has no gradient but rounding by a whole step: 6 rates at most
        np.testing.assert_allclose(a[1].get_value(), b[1].get_value(), atol=3e-6)

    shutil.rmtree(both.out / "checkpoints" / "6")
    before = losses(both.out)[1]
    train(both)
    assert losses(both.out)[0] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(both.out)[1], before, rtol=1e-5)


def test_what_the_first_process_refuses_all_refuse(files, tmp_path):
    settings = config(files, tmp_path / "run")
    settings.out.mkdir()
    (settings.out / "run.json").write_text("{}")
    codes, printed = in_processes(settings)
    assert codes[0] == 2 and "other settings" in printed[0]
    assert codes[1] != 0 and "process 0 failed, and so the job: ValueError" in printed[1]
