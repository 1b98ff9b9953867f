"""Capacity, FP8, decoding, repeated dispatch, counts, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.expert import Placement, combine, dispatch, layout

T, H, K, E, RANKS = 6, 256, 2, 8, 4
METHODS = ("all_to_all", "all_gather", "ragged", "peer")
SPEC = PartitionSpec("expert")


def over_ranks(f, outputs=SPEC):
    mesh = jax.make_mesh(
        (RANKS,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:RANKS]
    )
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=SPEC, out_specs=outputs))


def draw(tokens=T, h=H):
    rng = np.random.default_rng(0)
    idx = np.stack([rng.permutation(E)[:K] for _ in range(RANKS * tokens)]).astype(np.int32)
    x = jnp.asarray(rng.normal(size=(RANKS * tokens, h)), jnp.float32)
    return x, jnp.asarray(idx), jnp.asarray(rng.random(idx.shape), jnp.float32)


def send(x, idx, weights, **options):
    return dispatch(x, idx, weights, Placement.uniform(E, RANKS), axis="expert", **options)


def calc_diff(x, y):
    """DeepEP's measure of two arrays' difference, of which it adds 1 to both."""
    x, y = (np.asarray(a, np.float64) + 1 for a in (x, y))
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


@pytest.mark.parametrize("method", METHODS)
def test_what_comes_back_is_each_token_times_its_weights(method):
    x, idx, weights = draw()

    def there_and_back(x, idx, weights):
        sent = send(x, idx, weights, method=method)
        return combine(sent.tokens, sent.handle)

    got = over_ranks(there_and_back)(x, idx, weights)
    assert calc_diff(got, x * weights.sum(axis=1, keepdims=True)) < 5e-6


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_what_does_not_fit_is_left_out_and_counted(method):
    x, _, _ = draw()
    idx = jnp.tile(jnp.array([[3, 6]], jnp.int32), (RANKS * T, 1))

    def there_and_back(x, idx, weights):
        sent = send(x, idx, weights, capacity=4, method=method)
        return combine(sent.tokens, sent.handle), sent.overflow[None], sent.group_sizes

    got, overflow, sizes = over_ranks(there_and_back)(x, idx, jnp.ones(idx.shape))
    np.testing.assert_array_equal(overflow, np.full(RANKS, 2 * (T - 4)))  # to each of two ranks
    assert sizes.reshape(-1)[3] == sizes.reshape(-1)[6] == 4 * RANKS and sizes.sum() == 8 * RANKS
    kept = np.arange(RANKS * T) % T < 4
    np.testing.assert_allclose(got, np.where(kept[:, None], 2 * x, 0), rtol=1e-6)


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_rows_can_be_limited_and_what_is_too_much_is_counted(method):
    x, idx, weights = draw()

    def count(x, idx, weights):
        idx = jnp.full_like(idx, -1).at[:, 0].set(4)
        sent = send(x, idx, weights, alignment=4, max_rows=10, method=method)
        return sent.tokens, sent.group_sizes, sent.overflow[None]

    tokens, sizes, overflow = over_ranks(count)(x, idx, weights)
    assert tokens.shape == (RANKS * 12, H)
    np.testing.assert_array_equal(sizes, [0, 0, 0, 0, 12, 0, 0, 0])
    assert overflow.sum() == RANKS * T - 12


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_decoding_has_fixed_rows_of_every_expert(method):
    x, idx, weights = draw()

    def there_and_back(x, idx, weights):
        sent = send(x, idx, weights, max_tokens=16, method=method)
        assert sent.tokens.shape == (E // RANKS, 16, H)
        filled = jnp.any(sent.tokens != 0, axis=2).sum(axis=1)
        back = combine(sent.tokens, sent.handle)
        return back, sent.group_sizes, filled, sent.overflow[None]

    got, sizes, filled, overflow = over_ranks(there_and_back)(x, idx, weights)
    np.testing.assert_allclose(got, x * weights.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(sizes, np.bincount(np.asarray(idx).ravel(), minlength=E))
    np.testing.assert_array_equal(filled, sizes)
    assert not overflow.any()


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_decoding_counts_what_an_expert_has_no_row_for(method):
    x, idx, weights = draw()

    def count(x, idx, weights):
        to_one = jnp.where(idx == idx[:, :1], 2, -1)
        sent = send(x, to_one, weights, max_tokens=8, method=method)
        return sent.group_sizes, sent.overflow[None]

    sizes, overflow = over_ranks(count)(x, idx, weights)
    np.testing.assert_array_equal(sizes, [0, 0, 8, 0, 0, 0, 0, 0])
    assert overflow.sum() == RANKS * T - 8


@pytest.mark.parametrize("method", METHODS)
def test_fp8_arrives_as_it_was_quantised(method):
    x, idx, weights = draw()
    scale = 2.0 ** np.arange(RANKS * T)[:, None]

    def there(x, idx, weights):
        sent = send(x, idx, weights, quantize="fp8", method=method)
        assert sent.tokens.dtype == jnp.float8_e4m3fn and sent.scales.shape[1] == H // 128
        tokens = sent.tokens.astype(jnp.float32) * jnp.repeat(sent.scales, 128, axis=1)
        return combine(tokens, sent.handle)

    got = over_ranks(there)(x * scale, idx, weights)
    wanted = np.asarray(x) * np.asarray(weights).sum(axis=1, keepdims=True)
    assert calc_diff(np.asarray(got) / scale, wanted) < 9e-4
    with pytest.raises(NotImplementedError, match="a gradient of FP8 tokens or scales would be"):
        jax.grad(lambda x: jnp.sum(over_ranks(there)(x, idx, weights)))(x)


def test_a_gradient_through_an_fp8_wire_needs_one_collective_each_way():
    x, idx, weights = draw()

    def loss(x):
        def there_and_back(x, idx, weights):
            sent = send(x, idx, weights, quantize="fp8")
            return combine(sent.carrier, sent.handle)

        return jnp.sum(over_ranks(there_and_back)(x, idx, weights) ** 2)

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert len(re.findall(r"stablehlo.all_to_all", text)) == 4
    assert "stablehlo.scatter" not in text


@pytest.mark.parametrize("method", METHODS)
def test_the_carrier_brings_back_the_gradient_of_fp8_rows(method):
    x, idx, weights = draw()
    w, target = jnp.asarray(np.random.default_rng(1).normal(size=(2, RANKS * T, H)), jnp.float32)

    def loss(x, w, quantize):
        def there_and_back(x, idx, weights, w, target):
            sent = send(x, idx, weights, quantize=quantize, method=method)
            rows = sent.tokens if quantize is None else sent.carrier
            return jnp.sum(combine(jnp.sin(rows) * w[:1], sent.handle) * target)[None]

        return jnp.sum(over_ranks(there_and_back)(x, idx, weights, w, target))

    # rows are zeros there, and so is the carrier: gradients of either are the same
    value, got = jax.value_and_grad(loss)(0 * x, w, "fp8")
    assert value == 0
    np.testing.assert_allclose(got, jax.grad(loss)(0 * x, w, None), rtol=1e-6)


def test_everything_travels_in_one_collective_each_way():
    x, idx, weights = draw()

    def there_and_back(x, idx, weights):
        sent = send(x, idx, weights, quantize="fp8")
        return combine(sent.tokens.astype(jnp.float32), sent.handle)

    text = over_ranks(there_and_back).lower(x, idx, weights).as_text()
    assert len(re.findall(r"stablehlo.all_to_all", text)) == 2


def test_gradients_need_one_collective_each_way_and_no_scatter():
    x, idx, weights = draw()

    def there_and_back(x, idx, weights):
        sent = send(x, idx, weights)
        return combine(jnp.tanh(sent.tokens), sent.handle)

    def loss(x, weights):
        return jnp.sum(over_ranks(there_and_back)(x, idx, weights) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, weights).as_text()
    assert len(re.findall(r"stablehlo.all_to_all", text)) == 4
    assert "stablehlo.scatter" not in text


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_other_tokens_go_the_same_way_by_a_handle(method):
    x, idx, weights = draw()

    def twice(x, idx, weights):
        first = send(x, idx, weights, method=method)
        second = send(2 * x, None, None, handle=first.handle)
        return combine(second.tokens, second.handle) - 2 * combine(first.tokens, first.handle)

    np.testing.assert_allclose(over_ranks(twice)(x, idx, weights), 0, atol=1e-6)


def test_layout_counts_a_token_once_for_each_rank():
    placement = Placement.uniform(E, RANKS)
    idx = jnp.array([[0, 1], [0, 7], [-1, 7], [-1, -1]], jnp.int32)
    counts = layout(idx, placement)
    np.testing.assert_array_equal(counts.tokens_per_rank, [2, 0, 0, 2])
    np.testing.assert_array_equal(counts.tokens_per_expert, [2, 1, 0, 0, 0, 0, 0, 2])


def test_a_token_is_sent_once_to_each_rank():
    x, _, weights = draw()
    idx = jnp.tile(jnp.array([[2, 3]], jnp.int32), (RANKS * T, 1))  # both of one rank

    def count(x, idx, weights):
        sent = send(x, idx, weights)
        counts = layout(idx, Placement.uniform(E, RANKS))
        return sent.handle.hops[0].group_sizes, counts.tokens_per_rank, sent.group_sizes

    rows, counts, sizes = over_ranks(count)(x, idx, weights)
    np.testing.assert_array_equal(rows, np.tile([0, T, 0, 0], RANKS))
    np.testing.assert_array_equal(rows, counts)
    np.testing.assert_array_equal(sizes, [0, 0, RANKS * T, RANKS * T, 0, 0, 0, 0])


def test_replicas_take_turns():
    placement = Placement.from_eplb([0, 1, 1, 1], 2)
    slots = np.asarray(placement.slots_of(jnp.ones((6, 1), jnp.int32), 2))
    assert sorted(slots.ravel()) == [1, 1, 2, 2, 3, 3]


def test_a_new_placement_of_the_same_numbers_compiles_nothing():
    traces = []

    @jax.jit
    def f(placement, idx):
        traces.append(1)
        return placement.slots_of(idx)

    idx = jnp.zeros((3, 2), jnp.int32)
    f(Placement.from_eplb([0, 1, 2, 0], 2), idx)
    f(Placement.from_eplb([1, 1, 2, 0], 2), idx)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("slots", "ranks", "message"),
    [
        ([0, 1, 2], 2, r"\(3,\) must be \[slots\], a multiple of num_ranks=2"),
        ([0, 2, 2, 3], 2, r"without one: \[1\]"),
        ([0, -1], 2, "smallest number: -1"),
    ],
)
def test_impossible_placements_are_refused(slots, ranks, message):
    with pytest.raises(ValueError, match=message):
        Placement.from_eplb(slots, ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "carrier pigeon"}, "method='carrier pigeon' is unknown; choose from"),
        ({"quantize": "int4"}, "quantize='int4' must be None or 'fp8'"),
        ({"capacity": 0}, "capacity=0 must be positive"),
        ({"max_rows": 8, "max_tokens": 2}, "max_rows=8, max_tokens=2 must be .* not both"),
        ({"method": "ragged", "axis": ("node", "expert")}, "must name axes of the mesh"),
        ({"axis": "elsewhere"}, "axis='elsewhere' must name axes of the mesh"),
        (
            {"placement": Placement.uniform(6, 3)},
            "num_ranks=3 must be the size of axis='expert', 4",
        ),
    ],
    ids=["method", "quantize", "capacity", "two limits", "node", "axis", "ranks"],
)
def test_bad_options_are_refused_when_traced(options, message):
    options = {"axis": "expert", "placement": Placement.uniform(E, RANKS)} | options
    placement = options.pop("placement")
    f = functools.partial(dispatch, placement=placement, **options)
    with pytest.raises(ValueError, match=message):
        over_ranks(lambda x, idx, weights: f(x, idx, weights).tokens)(*draw())


def test_bad_shapes_are_refused_when_traced():
    x, idx, weights = draw()
    with pytest.raises(
        ValueError, match=r"topk_idx.shape=\(6, 2\) and topk_weights.shape=\(6, 1\)"
    ):
        over_ranks(lambda *a: send(*a).tokens)(x, idx, weights[:, :1])
    with pytest.raises(ValueError, match=r"x.shape=\(6, 256\) and topk_idx.shape=\(3, 2\) differ"):
        over_ranks(lambda *a: send(*a).tokens)(x, idx[::2], weights[::2])
    with pytest.raises(ValueError, match=r"x.shape=\(3, 256\) over axes .* with T=6"):
        over_ranks(lambda *a: send(x[:3], None, None, handle=send(*a).handle).tokens)(
            x, idx, weights
        )
    with pytest.raises(ValueError, match=r"x.shape=\(3, 256\) over axes .* with T=6"):
        over_ranks(
            lambda *a: send(x[:3], None, None, handle=send(*a, method="all_gather").handle).tokens
        )(x, idx, weights)
    with pytest.raises(ValueError, match="a handle stands for topk_idx and topk_weights"):
        over_ranks(lambda *a: send(*a, handle=send(*a).handle).tokens)(x, idx, weights)
    with pytest.raises(ValueError, match="y has 3 rows, but its handle is of"):
        over_ranks(lambda *a: combine(jnp.ones((3, H)), send(*a).handle))(x, idx, weights)
