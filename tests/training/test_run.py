import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.parallel.mesh import MeshConfig
from whalejax.training import run
from whalejax.training.loss import LossConfig
from whalejax.training.metrics import read_metrics
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.run import TrainConfig, evaluate, prepare, train
from whalejax.weights import save_pretrained


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in random order, enough for some hundred windows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0).choices(["the", "whale", "swims", "under", "a", "cold", "sea"], k=4000)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def weights(micro, tmp_path_factory):
    """A Hugging Face directory with the micro model."""
    path = tmp_path_factory.mktemp("weights") / "micro"
    save_pretrained(Decoder(micro, rngs=nnx.Rngs(5)), path)
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs here use one device; a step over eight is tested in test_step.py."""
    make = run.make_mesh
    monkeypatch.setattr(
        run, "make_mesh", lambda config: make(config, jax.devices()[: config.data * config.expert])
    )


@pytest.fixture
def config(text, weights, tmp_path):
    return TrainConfig(
        out=tmp_path / "run",
        from_pretrained=weights,
        data=text,
        steps=12,
        batch_size=8,
        length=32,
        save_every=4,
        log_every=1,
        export=False,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
    )


def losses(config):
    return {
        line["step"]: line["loss"]
        for line in read_metrics(config.out / "metrics.jsonl")
        if "loss" in line
    }


def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path):
    train(config)
    whole = losses(config)
    assert sorted(whole) == list(range(1, 13))
    again = dataclasses.replace(config, out=tmp_path / "stopped")
    for stop in (3, 9, None):
        train(dataclasses.replace(again, stop_at=stop))
    assert losses(again) == whole


def test_a_finished_run_is_not_trained_again(config):
    first = train(config)
    before = losses(config)
    assert train(config)["heldout_loss"] == first["heldout_loss"]
    assert losses(config) == before


def test_other_settings_are_refused_and_nothing_changes(config):
    train(dataclasses.replace(config, stop_at=2))
    before = (config.out / "run.json").read_text()
    other = dataclasses.replace(config, loss=LossConfig(mtp_weight=0.5))
    with pytest.raises(ValueError, match="other settings.*mtp_weight"):
        train(other)
    assert (config.out / "run.json").read_text() == before


def test_heldout_loss_counts_every_token_once(config):
    ready = prepare(config)
    state, _ = run.first_state(config, ready, _NoCheckpoints())
    got = evaluate(config, ready, state)
    model = run.model_of(ready.model, state)
    total, tokens = 0.0, ready.heldout.astype(np.int32)
    predict = jax.jit(model.__call__)
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        scores = np.asarray(predict(jnp.asarray(padded)), np.float64)[0]
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= scores[np.arange(len(window) - 1), window[1:]].sum()
    np.testing.assert_allclose(got, total / (len(tokens) - 1), rtol=1e-5)


class _NoCheckpoints:
    def latest(self):
        return None


@pytest.mark.long
def test_ten_bad_steps_stop_the_run_and_keep_the_checkpoint(config, micro, tmp_path):
    train(dataclasses.replace(config, stop_at=4))
    model = Decoder(micro, rngs=nnx.Rngs(5))
    model.lm_head[...] = jnp.full(model.lm_head.shape, jnp.nan)
    broken = tmp_path / "broken"
    save_pretrained(model, broken)
    sick = dataclasses.replace(config, from_pretrained=broken, out=tmp_path / "sick", steps=20)
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        train(sick)
    lines = read_metrics(sick.out / "metrics.jsonl")
    assert max(line["step"] for line in lines) < 12
    assert lines[-1]["skipped"] == lines[-1]["bad_streak"] == len(lines)
    assert losses(config).keys() == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"length": 10**6}, "1000000"),
        ({"batch_size": 9, "mesh": MeshConfig(data=2)}, "batch_size=9"),
        ({"batch_size": 9, "mesh": MeshConfig(expert=3)}, "n_routed_experts=4 .* expert=3"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(config, change, error):
    config = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match=error):
        train(config)
    assert not config.out.exists()


def test_metrics_name_every_part(config):
    train(dataclasses.replace(config, steps=3, eval_every=2))
    lines = read_metrics(config.out / "metrics.jsonl")
    assert {"loss", "loss_main", "loss_mtp", "balance_loss", "grad_norm", "lr", "skipped"} < set(
        lines[0]
    )
    assert np.shape(lines[0]["expert_load"]) == (2, 4)
    np.testing.assert_allclose(np.sum(lines[0]["expert_load"], axis=1), 1, atol=1e-4)
    assert [line["step"] for line in lines if "heldout_loss" in line] == [2, 3]
    assert (config.out / "loss.png").stat().st_size > 1000
    assert (config.out / "expert_load.png").stat().st_size > 1000
    assert json.loads((config.out / "run.json").read_text())["steps"] == 3


def test_a_killed_run_goes_on_to_the_same_loss(config, tmp_path):
    """SIGKILL at a random moment of the training, then the same command."""
    command = [
        sys.executable, "-m", "whalejax", "train", "--from", str(config.from_pretrained),
        "--data", str(config.data), "--steps", "60", "--batch-size", "8", "--length", "32",
        "--save-every", "5", "--log-every", "1", "--no-export", "--optimizer.warmup-steps", "2",
    ]  # fmt: skip
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(out):
        return subprocess.Popen(
            [*command, "--out", str(out)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    assert process.communicate(timeout=240)[1] is None
    assert process.returncode == 0
    process = start(killed)
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 200
    target = random.SystemRandom().randrange(11, 40)  # step 10's save waited for step 5's
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= target:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"not killed at step {target}"
    output, _ = start(killed).communicate(timeout=240)
    assert "resuming from step" in output
    of_run = [dataclasses.replace(config, out=out) for out in (whole, killed)]
    assert losses(of_run[0]) == losses(of_run[1])
    assert len(losses(of_run[0])) == 60


def test_train_config_prints_what_is_wrong():
    with pytest.raises(ValueError, match=r"steps=0, length=-1"):
        TrainConfig(steps=0, length=-1)
    with pytest.raises(ValueError, match="batch_size=7 must be a multiple of accumulate=2"):
        TrainConfig(batch_size=7, accumulate=2)


def test_metrics_reach_the_file_before_their_checkpoint(config, monkeypatch):
    written, save = {}, run.Checkpoints.save

    def spy(self, step, state):
        written[step] = max(losses(config))
        save(self, step, state)

    monkeypatch.setattr(run.Checkpoints, "save", spy)
    train(dataclasses.replace(config, steps=8, stop_at=7))
    assert written == {4: 4, 7: 7}
