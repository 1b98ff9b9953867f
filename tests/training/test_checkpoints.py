"""Checkpoints of a run: a disk that fails, a model read without the rest of its state."""

import errno

import jax
import numpy as np
import pytest
from flax import nnx

from whalejax.checkpoint import DamagedError
from whalejax.model.decoder import Decoder
from whalejax.model.parameters import RouterBias
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.storage.files import Files
from whalejax.training.checkpoints import Checkpoints
from whalejax.training.metrics import read_metrics
from whalejax.training.step import StepConfig, abstract_state, state_of
from whalejax.weights import save_pretrained
from whalejax.weights.config_json import parse_config, write_config
from whalejax.weights.runs import is_run, load_model, read_model_config


@pytest.fixture(scope="module")
def state(micro):
    return state_of(Decoder(micro, rngs=nnx.Rngs(5)), StepConfig(steps=10))


def full_disk(self, name, buffers, running=None):
    raise OSError(errno.ENOSPC, "No space left on device", f"{self.root / name}")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path, micro, state, monkeypatch, capsys
):
    with Checkpoints(tmp_path, micro) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)  # the first one stands now
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Files, "write", full_disk)
            checkpoints.save(3, state)
            with pytest.raises(OSError, match="No space left on device"):
                checkpoints.wait()
            checkpoints.save(4, state)
            checkpoints._store._saving.join()
        checkpoints.save(5, state)
    printed = " ".join(capsys.readouterr().out.split())
    assert "No space left on device" in printed
    assert "training goes on" in printed
    with Checkpoints(tmp_path, micro) as checkpoints:
        assert checkpoints.latest() == 5
        assert not checkpoints._store.unfinished()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


def test_the_last_checkpoint_of_a_run_has_to_succeed(tmp_path, micro, state, monkeypatch):
    monkeypatch.setattr(Files, "write", full_disk)
    with pytest.raises(OSError, match="No space left on device"), Checkpoints(tmp_path, micro) as c:
        c.save(1, state)


def test_a_step_that_is_there_is_not_saved_again(tmp_path, micro, state):
    with Checkpoints(tmp_path, micro) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(1, state)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_model_is_read_without_the_moments(tmp_path, micro, state):
    with Checkpoints(tmp_path, micro) as checkpoints:
        checkpoints.save(1, state)
    for chunk in (tmp_path / "checkpoints/1/arrays/opt_state").rglob("c/*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    assert is_run(tmp_path)
    assert not is_run(tmp_path / "checkpoints")
    assert read_model_config(tmp_path) == micro
    found = nnx.state(load_model(tmp_path))
    wanted = nnx.state(Decoder(micro, rngs=nnx.Rngs(5)))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    half = load_model(tmp_path, dtype="bfloat16")
    assert half.norm.dtype == "bfloat16"
    np.testing.assert_array_equal(half.lm_head[...], wanted.lm_head[...].astype("bfloat16"))
    biases = jax.tree.leaves(nnx.state(half, RouterBias))
    assert biases and all(bias.dtype == "float32" for bias in biases)  # as it was trained
    with Checkpoints(tmp_path, micro) as checkpoints:
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        abstract = abstract_state(micro, StepConfig(steps=10), mesh)
        with pytest.raises(DamagedError, match="opt_state"):
            checkpoints.restore(1, abstract)


def test_a_checkpoint_describes_its_model(micro):
    assert parse_config(write_config(micro, dtype="float32", fp8=False)) == micro


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_model(tmp_path)


TRAINS = """
import sys
from pathlib import Path
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.run import TrainConfig, train
weights, text, out = map(Path, sys.argv[1:])
train(TrainConfig(
    out=out, from_pretrained=weights, data=text, steps=12, batch_size=4, length=16, save_every=2,
    log_every=1, export=False, optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
))
"""


def test_training_goes_on_over_a_disk_that_fails_for_a_while(run_failing, micro, tmp_path):
    """The whole command, below it a C library that fails fsync as a broken disk would."""
    text = tmp_path / "words.txt"
    text.write_text("the whale swims under a cold sea " * 200)
    save_pretrained(Decoder(micro, rngs=nnx.Rngs(5)), tmp_path / "micro")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    arguments = (tmp_path / "micro", text, tmp_path / "run")
    done = run_failing(TRAINS, *arguments, below=folder, call="sync", at=900, times=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " ".join(done.stdout.split()).count("Input/output error") == 1
    assert "training goes on" in " ".join(done.stdout.split())
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    with Checkpoints(tmp_path / "run", micro) as checkpoints:
        assert checkpoints.latest() == 12
    assert load_model(tmp_path / "run").config == micro
