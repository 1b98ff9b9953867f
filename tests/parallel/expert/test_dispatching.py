"""Dispatch and combine on eight CPU devices, against every token's experts one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.kernels.quantization import quantize
from whalejax.parallel.eplb import rebalance_experts
from whalejax.parallel.expert import Placement, combine, dispatch

T, H, K, E = 12, 16, 3, 8
WAYS = {
    "all_to_all": {"axis": "expert", "method": "all_to_all"},
    "all_gather": {"axis": "expert", "method": "all_gather"},
    "ragged": {"axis": "expert", "method": "ragged"},
    "peer": {"axis": "expert", "method": "peer"},
    "hierarchical": {"axis": ("node", "expert")},
}


def mesh_of(axis, ranks):
    names = (axis,) if isinstance(axis, str) else axis
    shape = (ranks,) if len(names) == 1 else (2, ranks // 2)
    types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:ranks])


def choose(kind, tokens, rng, experts=E):
    """What tokens choose, each expert at most once."""
    idx = np.stack([rng.permutation(experts)[:K] for _ in range(tokens)]).astype(np.int32)
    if kind == "some unselected":
        return np.where(rng.random(idx.shape) < 0.3, -1, idx)
    if kind == "all to one":
        return np.where(np.arange(K) == 0, 5, -1).astype(np.int32).repeat(tokens, 0).reshape(-1, K)
    return idx


def draw(kind, ranks, seed=0, tokens=T):
    """Inputs of all ranks, one after another, and the experts' weights."""
    rng = np.random.default_rng(seed)
    n = ranks * tokens
    idx = choose(kind, n, rng) if kind != "all to one" else np.tile([5, -1, -1], (n, 1))
    x, target = rng.normal(size=(2, n, H))
    arrays = x, idx.astype(np.int32), rng.random((n, K)), rng.normal(size=(E, H, H)), target
    return [jnp.asarray(a, None if a.dtype == np.int32 else jnp.float32) for a in arrays]


def moe(x, idx, weights, w, *, placement, way, **options):
    """A mixture of experts on this rank, whose slots have weights of their experts."""
    slots = placement.slots_per_rank
    sent = dispatch(x, idx, weights, placement, **way, alignment=4, **options)
    starts = jnp.cumsum(-(-sent.group_sizes // 4) * 4)
    slot = jnp.sum(jnp.arange(sent.tokens.shape[0])[:, None] >= starts[None], axis=1)
    rank = jax.lax.axis_index(way["axis"])
    own = jax.lax.dynamic_slice_in_dim(
        jnp.asarray(placement.physical_to_logical), rank * slots, slots
    )
    rows = sent.tokens
    if sent.carrier is not None:  # the gradient of rows as they were before FP8
        rows = jax.lax.stop_gradient(sent.rows().dequantize()) + sent.carrier
    y = jnp.einsum("rh,rhg->rg", rows, w[own][jnp.minimum(slot, slots - 1)])
    return combine(jnp.tanh(y), sent.handle), sent.overflow[None]


def over_ranks(f, way, ranks, check_vma=True, mesh=None):
    """f on every rank: arrays of tokens are cut, all others whole."""
    axes = PartitionSpec(way["axis"])
    specs = (axes, axes, axes, PartitionSpec())
    mesh = mesh or mesh_of(way["axis"], ranks)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=axes, check_vma=check_vma)


def dense(x, idx, weights, w):
    """The same, token by token, in float64."""
    x, weights, w = (np.asarray(a, np.float64) for a in (x, weights, w))
    out = np.zeros_like(x)
    for t, choice in np.ndindex(*idx.shape):
        if idx[t, choice] >= 0:
            out[t] += weights[t, choice] * np.tanh(x[t] @ w[idx[t, choice]])
    return out


def placement_of(name, ranks):
    if name == "uniform":
        return Placement.uniform(E, ranks)
    if name == "planned":
        load = np.arange(1.0, E + 1)[None]
        plan = rebalance_experts(load, 2 * E, 1, 1, ranks, method="whale")
        return Placement.from_eplb(plan.physical_to_logical[0], ranks)
    slots = np.concatenate([np.arange(E), [5, 5, 0, 3, 5, 1, 2, 5]])
    return Placement.from_eplb(np.random.default_rng(1).permutation(slots), ranks)


def gradients(f, arrays):
    x, idx, weights, w, target = arrays

    def loss(x, weights, w):
        return jnp.sum(f(x, idx, weights, w)[0] * target)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, w)


def one_device(x, idx, weights, w):
    chosen = jax.nn.one_hot(idx, E) * weights[..., None]
    return jnp.einsum("tke,teh->th", chosen, jnp.tanh(jnp.einsum("th,ehg->teg", x, w))), 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ranks", "replicas"),
    [(4, "uniform"), (4, "replicated"), (4, "planned"), (8, "uniform"), (8, "replicated")],
)
@pytest.mark.parametrize("kind", ["all chosen", "some unselected", "all to one"])
def test_equals_every_tokens_own_experts(way, ranks, replicas, kind):
    arrays = draw(kind, ranks)
    f = functools.partial(moe, placement=placement_of(replicas, ranks), way=WAYS[way])
    out, overflow = jax.jit(over_ranks(f, WAYS[way], ranks))(*arrays[:4])
    np.testing.assert_allclose(out, dense(*arrays[:4]), rtol=1e-5, atol=1e-5)
    assert not overflow.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", [None, "fp8"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_equal_those_of_one_device(way, wire, check_vma):
    arrays = draw("some unselected", 8)
    if wire == "fp8":
        arrays[0] = quantize(arrays[0]).dequantize()  # rounding it again changes nothing
    placement = placement_of("replicated", 8)
    f = functools.partial(moe, placement=placement, way=WAYS[way], quantize=wire)
    got = gradients(over_ranks(f, WAYS[way], 8, check_vma), arrays)
    for a, b in zip(got, gradients(one_device, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_token_a_rank(way):
    arrays = draw("all chosen", 8, tokens=1)
    f = functools.partial(moe, placement=placement_of("uniform", 8), way=WAYS[way])
    out, _ = jax.jit(over_ranks(f, WAYS[way], 8))(*arrays[:4])
    np.testing.assert_allclose(out, dense(*arrays[:4]), rtol=1e-5, atol=1e-5)
