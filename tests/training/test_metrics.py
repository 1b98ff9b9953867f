import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.presets import PRESETS
from whalejax.training.metrics import (
    MetricsFile,
    active_parameters,
    peak_flops,
    read_metrics,
    training_flops_per_token,
)


def test_lines_after_the_restored_step_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    for step in (10, 20, 30):
        file.write(step=step, loss=jnp.float32(1.5), load=np.ones((2, 2)))
    path.write_text(path.read_text() + '{"step": 40, "lo')  # cut off by a kill
    MetricsFile(path, resume_step=20)
    assert [line["step"] for line in read_metrics(path)] == [10, 20]
    assert json.loads(path.read_text().splitlines()[0])["load"] == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("name", ["tiny", "small", "v2-lite", "v3"])
def test_active_parameters_agree_with_the_shapes(name):
    config = PRESETS[name]
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]
    total = 0.0
    for path, leaf in leaves:
        text = jax.tree_util.keystr(path)
        if "norm" in text or "embed_tokens" in text or "mtp_layers" in text:
            continue
        share = config.moe.num_experts_per_tok / config.moe.n_routed_experts
        total += math.prod(leaf.shape) * (share if ".experts" in text or "'experts'" in text else 1)
    assert active_parameters(config, mtp=False) == round(total)


def test_flops_are_six_a_parameter_and_the_attention():
    config = PRESETS["tiny"]
    short, long = (training_flops_per_token(config, n) for n in (1, 1001))
    assert long - short == 3 * 1000 * 4 * (48 + 32) * 4
    assert short > 6 * active_parameters(config)


def test_a_cpu_has_no_peak():
    assert peak_flops(jax.devices("cpu")[0]) is None
