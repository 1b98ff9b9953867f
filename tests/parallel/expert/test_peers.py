"""Expert parallelism through the memory of peers: what is lowered for GPUs, and what is refused.

Its values are tested with those of the other methods; on GPUs, by `on_ranks.py`.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.peers import hopper
from whalejax.kernels.permutation import plan_permutation
from whalejax.parallel.expert import Placement, combine, dispatch, peers

RANKS, T, K, E = 4, 64, 3, 8
needs_mosaic = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))


def moe(x, weights, idx, **options):
    """There, there again, and back."""
    placement = Placement.uniform(E, jax.lax.axis_size("expert"))
    way = {"axis": "expert", "method": "peer"} | options
    sent = dispatch(x, idx, weights, placement, **way)
    again = dispatch(x, None, None, placement, axis="expert", handle=sent.handle)
    rows = sent.tokens if sent.carrier is None else sent.carrier
    return combine(rows + again.tokens, sent.handle)


def trace(h, shape=(1, RANKS), **options):
    """A training step over the devices of a mesh."""
    spec, types = PartitionSpec(("data", "expert")), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(
        shape, ("data", "expert"), axis_types=types, devices=jax.devices()[: math.prod(shape)]
    )

    def loss(*arrays):
        f = jax.shard_map(lambda *a: moe(*a, **options), mesh=mesh, in_specs=spec, out_specs=spec)
        return jnp.sum(f(*arrays).astype(jnp.float32))

    shapes = ((T, h), jnp.bfloat16), ((T, K), jnp.float32), ((T, K), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arrays)


@needs_mosaic
@pytest.mark.parametrize(("wire", "shape"), [(None, (1, RANKS)), ("fp8", (2, RANKS))])
def test_kernels_are_lowered_for_gpus_in_both_directions(wire, shape):
    text = trace(256, shape, quantize=wire).lower(lowering_platforms=("cuda",)).as_text()
    assert "gather_from_peers" in text and "sums_to_peers" in text
    assert text.count("reduce_scatter") == 1  # of the weights' gradients
    assert "all_to_all" not in text


@needs_mosaic
def test_a_rank_without_peers_needs_no_kernel():
    text = trace(256, (2, 1)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text


@needs_mosaic
def test_what_the_kernels_cannot_do_is_refused_where_there_are_gpus(monkeypatch):
    monkeypatch.setattr(peers, "no_gpu", lambda: None)
    trace(256)
    with pytest.raises(
        NotImplementedError, match=r"'peer' cannot run: rows of bfloat16\[16, 192\]"
    ):
        trace(192)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(NotImplementedError, match="'peer' cannot run: .* one process, here are 2"):
        trace(256)


def test_rows_that_fill_a_multiprocessor_are_left_to_collectives():
    plan = plan_permutation(jnp.zeros((T, K), jnp.int32), E)
    rows = jax.ShapeDtypeStruct((T, 2**12), jnp.float32)
    assert hopper.why_not_rows([rows], plan) is None
    reason = hopper.why_not_rows([rows, rows], plan, summed=True)
    assert reason == "192 choices and rows of 32768 bytes fill the SMEM"
