import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.training.optimizer import (
    OptimizerConfig,
    clip,
    decayed,
    learning_rate,
    make_optimizer,
)


def test_schedule_warms_up_stays_and_decays():
    config = OptimizerConfig(peak_lr=1.0, final_lr=0.1, warmup_steps=10, constant_fraction=0.5)
    rate = learning_rate(config, 100)
    with jax.numpy_dtype_promotion("standard"):
        got = [float(rate(step)) for step in (0, 5, 10, 50, 75, 100)]
    np.testing.assert_allclose(got, [0, 0.5, 1, 1, 0.55, 0.1], atol=1e-6)


def test_warmup_longer_than_the_run_still_ends():
    rate = learning_rate(OptimizerConfig(warmup_steps=2000), 10)
    with jax.numpy_dtype_promotion("standard"):
        assert np.isfinite(float(rate(10)))


def test_norms_are_not_decayed(micro):
    params = nnx.state(Decoder(micro, rngs=nnx.Rngs(0)), nnx.Param)
    marks = jax.tree_util.tree_flatten_with_path(decayed(params))[0]
    free = {jax.tree_util.keystr(path) for path, mark in marks if not mark}
    assert len(free) == 3 * 4 + 3 + 1  # four norms a layer kind, three of MTP, the last
    assert all("norm" in path for path in free)


def test_one_update_equals_adamw_by_hand():
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1.0)
    params = {"w": jnp.array([[1.0, -2.0]]), "norm": jnp.array([3.0])}
    grads = {"w": jnp.array([[3.0, 0.0]]), "norm": jnp.array([4.0])}
    grads = clip(grads, jnp.float32(5), config.clip_norm)
    np.testing.assert_allclose(grads["w"], [[0.6, 0]], rtol=1e-6)
    optimizer = make_optimizer(config, 100)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # global norm 5 clips to (0.6, 0, 0.8); Adam's first step is the sign of the gradient
    np.testing.assert_allclose(updates["w"], [[-0.1 - 0.05, 0.1]], rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], [-0.1], rtol=1e-5)


def test_a_small_gradient_is_not_clipped():
    grads = {"w": jnp.array([0.3, 0.4])}
    np.testing.assert_array_equal(clip(grads, jnp.float32(0.5), 1.0)["w"], grads["w"])


@pytest.mark.parametrize(
    ("name", "value"), [("peak_lr", 0.0), ("beta1", 1.0), ("clip_norm", -1.0), ("final_lr", -1.0)]
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        OptimizerConfig(**{name: value})
