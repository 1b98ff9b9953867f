import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.permutation import api, permute, plan_permutation, unpermute

# few sizes, since each combination compiles; the choices vary freely
CHOICES = st.tuples(
    st.sampled_from([1, 12]), st.sampled_from([1, 3]), st.just(4), st.sampled_from([1, 8]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip


planned = jax.jit(plan_permutation, static_argnames=("num_experts", "alignment"))


def choose(tokens, k, experts, seed):
    """Distinct experts of each token, some of them -1."""
    rng = np.random.default_rng(seed)
    idx = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    return np.where(rng.random(idx.shape) < 0.2, -1, idx).astype(np.int32)


@pytest.mark.parametrize("size", [1, 500])
def test_counting_gives_the_order_of_sorting(size):
    key = jnp.asarray(np.random.default_rng(size).integers(0, 9, size), jnp.uint8)
    for counted, is_sorted in zip(api._by_counting(key), api._by_sorting(key), strict=True):
        np.testing.assert_array_equal(counted, is_sorted)


@pytest.mark.parametrize("experts", [255, 256, 300])
def test_experts_are_told_apart_however_many_there_are(experts):
    idx = np.random.default_rng(0).permutation(experts).astype(np.int32)
    plan = plan_permutation(jnp.asarray(idx[:, None]), experts, alignment=1)
    np.testing.assert_array_equal(plan.row_of[:, 0], idx)
    assert (plan.group_sizes == 1).all()


@given(sizes=CHOICES)
@settings(max_examples=100, deadline=None)
def test_every_choice_has_one_row_in_its_experts_range(sizes):
    tokens, k, experts, alignment, seed = sizes
    idx = choose(tokens, k, experts, seed)
    plan = jax.tree.map(np.asarray, planned(jnp.asarray(idx), experts, alignment=alignment))
    np.testing.assert_array_equal(
        plan.group_sizes, [(idx == expert).sum() for expert in range(experts)]
    )
    starts = np.cumsum([0, *(-(-plan.group_sizes // alignment) * alignment)])
    rows = len(plan.source)
    assert rows % alignment == 0 and starts[-1] <= rows
    used = plan.row_of[idx >= 0]
    assert len(set(used)) == len(used)
    assert (plan.row_of[idx < 0] == rows).all()
    for t, choice in np.ndindex(*idx.shape):
        expert, row = idx[t, choice], plan.row_of[t, choice]
        if expert >= 0:
            assert starts[expert] <= row < starts[expert] + plan.group_sizes[expert]
            assert plan.source[row] == t * k + choice
    padding = np.setdiff1d(np.arange(rows), used)
    assert (plan.source[padding] == idx.size).all()


@pytest.mark.parametrize(
    "idx",
    [[[2], [2], [2], [2], [2]], [[0, 1]], [[-1, -1], [-1, -1]], [[3, 0], [-1, 3], [0, 3]]],
    ids=["all to one", "one token", "nobody", "uneven"],
)
def test_there_and_back_weighs_and_sums(idx):
    idx = jnp.asarray(idx, jnp.int32)
    plan = plan_permutation(idx, 4, alignment=8)
    x = jax.random.normal(jax.random.key(0), (idx.shape[0], 6))
    weights = jax.random.uniform(jax.random.key(1), idx.shape)
    back = unpermute(permute(x, plan), weights, plan)
    total = np.sum(np.where(idx >= 0, weights, 0), axis=1, keepdims=True)
    np.testing.assert_allclose(back, np.asarray(x) * total, rtol=1e-6, atol=1e-7)


def test_padding_rows_are_zero():
    plan = plan_permutation(jnp.array([[1], [1], [0]], jnp.int32), 3, alignment=4)
    rows = np.asarray(permute(jnp.ones((3, 2)), plan))
    np.testing.assert_array_equal(rows.sum(1), [2, 0, 0, 0, 2, 2, *[0] * (len(rows) - 6)])


def test_a_capacity_gives_every_expert_its_rows_and_counts_what_is_too_much():
    idx = jnp.array([[1, 0], [1, -1], [1, 0]], jnp.int32)
    plan = plan_permutation(idx, 3, capacity=2)
    rows = np.asarray(permute(jnp.arange(1.0, 4.0)[:, None], plan)).reshape(3, 2)
    np.testing.assert_array_equal(rows, [[1, 3], [1, 2], [0, 0]])
    np.testing.assert_array_equal(plan.group_sizes, [2, 2, 0])
    assert plan.overflow == 1
    back = unpermute(permute(jnp.ones((3, 1)), plan), None, plan)
    np.testing.assert_array_equal(back[:, 0], [2, 1, 1])


def test_rows_past_the_most_are_left_out_and_counted():
    idx = jnp.array([[1, 0], [1, 2], [1, 0]], jnp.int32)
    plan = plan_permutation(idx, 3, alignment=2, max_rows=5)  # 2 of expert 0, then 3 + 1 of 1
    assert plan.source.shape == (6,) and plan.overflow == 1
    np.testing.assert_array_equal(plan.group_sizes, [2, 3, 0])
    back = unpermute(permute(jnp.ones((3, 1)), plan), None, plan)
    np.testing.assert_array_equal(back[:, 0], [2, 1, 2])
    exact = plan_permutation(idx, 3, alignment=2, max_rows=1000)
    jax.tree.map(np.testing.assert_array_equal, exact, plan_permutation(idx, 3, alignment=2))


def test_gradients_without_weights_equal_those_with_ones():
    idx = jnp.asarray(choose(9, 2, 4, 5))
    plan = plan_permutation(idx, 4, alignment=8)
    rows = jax.random.normal(jax.random.key(0), (plan.source.shape[0], 5))

    def loss(rows, weights):
        return jnp.sum(jnp.sin(unpermute(rows, weights, plan)))

    got = jax.grad(loss)(rows, None)
    np.testing.assert_allclose(got, jax.grad(loss)(rows, jnp.ones(idx.shape)), rtol=1e-6)


def test_gradients_equal_those_of_a_dense_formula():
    idx = jnp.asarray(choose(9, 2, 4, 5))
    plan = plan_permutation(idx, 4, alignment=8)
    keys = jax.random.split(jax.random.key(0), 4)
    x, weights = jax.random.normal(keys[0], (9, 5)), jax.random.uniform(keys[1], (9, 2))
    scale = jax.random.normal(keys[2], (4, 5))  # what each expert multiplies its rows by
    target = jax.random.normal(keys[3], (9, 5))

    def sparse(x, weights, scale):
        starts = jnp.cumsum(-(-plan.group_sizes // 8) * 8)
        rows = permute(x, plan)
        expert = jnp.sum(jnp.arange(len(rows))[:, None] >= starts[None], axis=1)
        rows = jnp.tanh(rows * scale[jnp.minimum(expert, 3)])
        return jnp.sum(unpermute(rows, weights, plan) * target)

    def dense(x, weights, scale):
        out = jnp.tanh(x[:, None] * scale[None])  # [token, expert, 5]
        chosen = jnp.where(idx[..., None] >= 0, jax.nn.one_hot(idx, 4) * weights[..., None], 0.0)
        return jnp.sum(jnp.einsum("tke,teh->th", chosen, out) * target)

    got = jax.jit(jax.grad(sparse, argnums=(0, 1, 2)))(x, weights, scale)
    expected = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(x, weights, scale)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match=r"topk_idx.shape=\(3,\)"):
        plan_permutation(jnp.zeros(3, jnp.int32), 4)
    with pytest.raises(ValueError, match="capacity=0"):
        plan_permutation(jnp.zeros((3, 1), jnp.int32), 4, capacity=0)
    with pytest.raises(ValueError, match="capacity=4 or max_rows=8 positive, not both"):
        plan_permutation(jnp.zeros((3, 1), jnp.int32), 4, capacity=4, max_rows=8)
    with pytest.raises(ValueError, match="num_experts=0"):
        plan_permutation(jnp.zeros((3, 1), jnp.int32), 0)
