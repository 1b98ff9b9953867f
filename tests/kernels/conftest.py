"""Mosaic GPU kernels in tests: interpreted on the CPU, or as they are where there is a GPU.

On a GPU: `JAX_PLATFORMS=cuda pytest tests/kernels -k hopper`.
"""

import jax
import jax.numpy as jnp
import pytest

from whalejax.kernels import mosaic


@pytest.fixture
def run(monkeypatch):
    """Runs a function with its kernels: on a GPU if there is one, else interpreted as for 2 SMs."""
    if jax.default_backend() == "gpu":
        yield run_on_gpu
        return
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(mosaic, "num_sms", lambda: 2)

    def call(function, *arguments, detect_races=False):
        params = plgpu.InterpretGPUParams(detect_races=detect_races)
        with plgpu.force_gpu_interpret_mode(params):
            # a new function: what was traced for another mode must not be reused
            return jax.block_until_ready(jax.jit(lambda *a: function(*a))(*arguments))

    yield call
    gpu_callbacks.reset_gpu_interpret_mode_state()  # a failed kernel leaves its own


def run_on_gpu(function, *arguments, detect_races=False):
    """Runs a function on the GPU, in memory that held NaN before: what is not written shows."""
    if detect_races:
        pytest.skip("races are looked for by the interpreter")
    compiled = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
    sizes = [max(a.size, 1) for a in jax.tree.leaves(compiled.out_info)]
    poison = [jnp.full((size,), jnp.nan, jnp.float32) for size in sizes for _ in range(2)]
    jax.block_until_ready(poison)
    del poison
    return jax.block_until_ready(compiled(*arguments))


@pytest.fixture
def assert_no_races(run, capfd, monkeypatch):
    """Runs a function and looks for races.

    Arrivals are fenced here, in the interpreter's memory model alone. It orders a read of SMEM
    before a later TMA into the same place by a fence of proxies only. On the hardware the arrival
    that says a slot was read does, as in DeepGEMM and CUTLASS.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrive = plgpu.barrier_arrive

    def fence_and_arrive(barrier, **options):
        plgpu.commit_smem()
        arrive(barrier, **options)

    def check(function, *arguments):
        monkeypatch.setattr(plgpu, "barrier_arrive", fence_and_arrive)
        run(function, *arguments, detect_races=True)
        assert "RACE DETECTED" not in capfd.readouterr().out

    return check
