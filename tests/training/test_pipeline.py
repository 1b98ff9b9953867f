"""What a pipeline refuses, and runs that go from one mesh to another."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder, Execution
from whalejax.model.sharding import path_name
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training.experts import EPLBConfig
from whalejax.training.metrics import read_metrics
from whalejax.training.pipeline import PipelineConfig
from whalejax.training.run import TrainConfig, train
from whalejax.training.step import StepConfig, abstract_state
from whalejax.weights import from_pretrained, save_pretrained

STAGES = MeshConfig(stage=2, data=2, expert=2, fsdp=1)


@pytest.fixture(scope="module")
def config(micro, tmp_path_factory):
    """A run of the micro model through two stages of four devices."""
    folder = tmp_path_factory.mktemp("files")
    words = random.Random(0).choices(["the", "whale", "swims", "under", "a", "cold", "sea"], k=2000)
    (folder / "words.txt").write_text(" ".join(words))
    save_pretrained(Decoder(micro, rngs=nnx.Rngs(5)), folder / "micro")
    return TrainConfig(
        out=folder / "run",
        from_pretrained=folder / "micro",
        data=folder / "words.txt",
        steps=4,
        batch_size=16,
        length=8,
        save_every=2,
        log_every=1,
        mesh=STAGES,
        pipeline=PipelineConfig(schedule="dualpipe"),
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pipeline": {"schedule": "zigzag"}}, "'zigzag' .* schedules are gpipe, 1f1b"),
        ({"pipeline": {"microbatches": 2}}, "num_microbatches=2 .* at least 2 \\* num_ranks = 4"),
        ({"pipeline": {"chunks_per_rank": 2}}, "chunks_per_rank=2: only 'interleaved'"),
        ({"pipeline": {"schedule": "interleaved"}}, "chunks_per_rank must be at least 2"),
        ({"batch_size": 24}, "24 sequences must be a multiple of microbatches=4 times the 4 dev"),
        ({"batch_size": 48, "accumulate": 2}, "24 sequences must be a multiple of microbatches=4"),
        ({"overlap": True}, "overlap=True and eplb.every=0 must be .* stage=2"),
        ({"eplb": EPLBConfig(every=3)}, "overlap=False and eplb.every=3 must be .* stage=2"),
        ({"exchange": "peer"}, "exchange='peer' with stage=2 of the mesh"),
        ({"mesh": MeshConfig(stage=8)}, "num_stages=8 leaves stages without layers: 1 dense"),
        ({"mesh": MeshConfig(stage=3, fsdp=1)}, "stage=3 x data=1 x fsdp=1 x expert=1 is 3 dev"),
        (
            {"mesh": MeshConfig(data=2, expert=4), "pipeline": {"microbatches": 8}},
            "microbatches=8.* needs several ranks of the mesh axis 'stage'",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused_before_anything_is_written(config, change, error, tmp_path):
    change = dict(change)
    if "pipeline" in change:
        change["pipeline"] = PipelineConfig(**change["pipeline"])
    with pytest.raises(ValueError, match=error):
        train(dataclasses.replace(config, out=tmp_path / "run", **change))
    assert not list(tmp_path.iterdir())


def test_a_model_without_experts_is_refused(micro, config, tmp_path):
    dense = dataclasses.replace(micro, first_k_dense_replace=2, num_nextn_predict_layers=0)
    save_pretrained(Decoder(dense, rngs=nnx.Rngs(5)), tmp_path / "dense")
    config = dataclasses.replace(config, out=tmp_path / "run", from_pretrained=tmp_path / "dense")
    with pytest.raises(ValueError, match="a pipeline shares out MoE layers, and there are none"):
        train(config)
    assert not (tmp_path / "run").exists()


def losses(config):
    lines = [line for line in read_metrics(config.out / "metrics.jsonl") if "loss" in line]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.long
def test_a_run_goes_on_without_stages_and_with_them_again(config):
    """Two steps through a pipeline, one without, one through a pipeline; and all four without."""
    plain = dataclasses.replace(
        config, mesh=MeshConfig(data=2, expert=4), pipeline=PipelineConfig(), eval_every=2
    )
    whole = dataclasses.replace(plain, out=config.out.with_name("whole"))
    train(dataclasses.replace(config, stop_at=2))
    train(dataclasses.replace(plain, stop_at=3))
    summary, of_whole = train(config), train(whole)
    assert losses(config).keys() == losses(whole).keys() == {1, 2, 3, 4}
    for step, loss in losses(whole).items():
        np.testing.assert_allclose(losses(config)[step], loss, rtol=1e-5)
    np.testing.assert_allclose(summary["heldout_loss"], of_whole["heldout_loss"], rtol=1e-5)
    ours, theirs = (nnx.state(from_pretrained(c.out / "model")) for c in (config, whole))
    for a, b in zip(*map(nnx.to_flat_state, (ours, theirs)), strict=True):
        # Adam moves what has no gradient but rounding by a whole step: 4 rates at most
        np.testing.assert_allclose(a[1].get_value(), b[1].get_value(), atol=2e-6)


def test_the_state_is_cut_over_stages(micro):
    """Layers where the stages divide them; what both ends share as fsdp cuts it."""
    mesh = make_mesh(STAGES)
    model = dataclasses.replace(micro, num_hidden_layers=3)
    state = abstract_state(model, StepConfig(steps=1, execution=Execution(mesh=mesh)), mesh)
    parts = {
        path_name(path): leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]
    }
    assert parts["moe_layers.mlp.experts.gate_proj"] == (1, 2, 24, 32)  # of 2 layers, 4 experts
    assert parts["moe_layers.input_layernorm"] == (1, 32)
    assert parts["mtp_layers.layer.mlp.experts.gate_proj"] == (1, 2, 12, 32)
    assert parts["lm_head"] == (256, 16)
