"""Pipelines against the same model run stage after stage, on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from whalejax.parallel.dualpipe import SCHEDULES, deferrable, make_schedule, value_and_grad

WIDTH, VOCABULARY, ROWS = 8, 16, 3
CHUNKS = {"interleaved": 2}  # of a rank, as asked for


def multiply(x, w):
    return x @ w


def enter(ends, tokens):
    return {"h": ends["embedding"][tokens], "penalty": jnp.zeros((), ends["embedding"].dtype)}


def run_stage(params, x):
    """Two linears whose gradients may wait and a bias; an auxiliary loss travels along."""
    inner = deferrable(multiply, x["h"], params["in"])
    hidden = jnp.tanh(inner + params["bias"][None])
    y = x["h"] + deferrable(multiply, hidden, params["out"])
    report = {"square": jnp.mean(y**2), "rows": jnp.int32(len(y))}
    return {"h": y, "penalty": x["penalty"] + jnp.mean(inner**2)}, report


def close(ends, x, labels):
    """Cross-entropy with the embedding's transpose as head."""
    logits = (x["h"] * ends["scale"][None]) @ ends["embedding"].T
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    loss = 0.1 * x["penalty"] - jnp.mean(scores)
    return loss, {"right": jnp.sum(jnp.argmax(logits, axis=1).astype(labels.dtype) == labels)}


def draw(stages, microbatches, dtype=np.float32):
    """Parameters of stages and ends, inputs and labels."""
    rng = np.random.default_rng(stages)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 3, dtype)

    params = {
        "in": normal(stages, WIDTH, WIDTH),
        "bias": normal(stages, WIDTH),
        "out": normal(stages, WIDTH, WIDTH),
    }
    ends = {"embedding": normal(VOCABULARY, WIDTH), "scale": 1 + normal(WIDTH)}
    tokens, labels = rng.integers(VOCABULARY, size=(2, microbatches * ROWS), dtype=np.int32)
    return params, ends, jnp.asarray(tokens), jnp.asarray(labels)


def waits(path, leaf):
    return leaf.ndim == 3


def mesh_of(ranks):
    return jax.make_mesh(
        (ranks,), ("stage",), devices=jax.devices()[:ranks], axis_types=(AxisType.Auto,)
    )


def stages_of(name, ranks, chunks=None):
    return ranks * (2 if name == "dualpipev" else chunks or CHUNKS.get(name, 1))


def pipelined(name, ranks, microbatches, arguments, stage=run_stage, **options):
    """Loss, reports and gradients of a pipeline."""
    options = {
        "schedule": name,
        "defer": waits,
        "chunks_per_rank": CHUNKS.get(name, 1),
        **options,
    }
    step = value_and_grad(
        stage,
        close,
        mesh=mesh_of(ranks),
        num_microbatches=microbatches,
        first_fn=enter,
        has_aux=True,
        **options,
    )
    params, ends, tokens, labels = arguments
    (loss, reports), gradients = jax.jit(step)(params, tokens, labels, ends)
    return loss, reports, gradients


@functools.partial(jax.jit, static_argnums=(0, 1))
def sequential(microbatches, stage, params, ends, tokens, labels):
    """The same of one stage after the other, on one device."""

    def of_one(params, ends, tokens, labels):
        x, reports = lax.scan(lambda x, p: stage(p, x), enter(ends, tokens), params)
        loss, report = close(ends, x, labels)
        return loss, (reports, report)

    def of_all(params, ends):
        cut = [a.reshape(microbatches, -1) for a in (tokens, labels)]
        losses, reports = lax.map(lambda batch: of_one(params, ends, *batch), cut)
        return jnp.mean(losses), jax.tree.map(lambda a: jnp.sum(a, axis=0), reports)

    gradients = jax.value_and_grad(of_all, argnums=(0, 1), has_aux=True)
    (loss, reports), gradients = gradients(params, ends)
    return loss, reports, gradients


def assert_equal(found, wanted, tolerance=1e-6):
    """Losses bitwise, all else by the norm of each leaf."""
    assert found[0] == wanted[0]
    for a, b in zip(*map(jax.tree.leaves, (found[1:], wanted[1:])), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)
        else:
            np.testing.assert_array_equal(a, b)


def compare(name, ranks, microbatches, stages=None, tolerance=1e-6, dtype=np.float32, **options):
    stages = stages or stages_of(name, ranks, options.get("chunks_per_rank"))
    arguments = draw(stages, microbatches, dtype)
    found = pipelined(name, ranks, microbatches, arguments, **options)
    stage = options.get("stage", run_stage)
    assert_equal(found, sequential(microbatches, stage, *arguments), tolerance)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_and_gradients_are_those_of_the_model(name, ranks):
    compare(name, ranks, 2 * ranks)


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_so_they_are_with_a_steady_state(name, ranks):
    compare(name, ranks, 6 * ranks)


@pytest.mark.parametrize("name", ["interleaved", "zb1p", "dualpipe"])
def test_in_float64_they_differ_by_its_rounding(name):
    with jax.enable_x64(True):
        compare(name, 2, 4, dtype=np.float64, tolerance=1e-12)


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_backwards_may_be_whole(name):
    compare(name, 2, 4, split_backward=False)


def test_a_rank_may_have_three_chunks():
    compare("interleaved", 2, 4, chunks_per_rank=3)


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("gpipe", 2, 1), ("1f1b", 4, 3), ("zb1p", 2, 5), ("dualpipev", 2, 5)],
)
def test_microbatches_may_be_odd_and_few(name, ranks, microbatches):
    compare(name, ranks, microbatches)


@pytest.mark.parametrize("name", ["zb1p", "dualpipev"])
def test_one_rank_is_a_pipeline(name):
    compare(name, 1, 4)


def test_stages_may_be_computed_again():
    # inside of the checkpoint nothing is kept, and the deferred gradients wait as ever
    compare("dualpipe", 2, 6, stage=jax.checkpoint(run_stage))


def test_an_order_of_ones_own_runs():
    schedule = make_schedule("gpipe", 2, 5)
    shuffled = [3, 0, 4, 1, 2]
    steps = tuple(
        tuple((op._replace(microbatch=shuffled[op.microbatch]),) for (op,) in of_rank)
        for of_rank in schedule.steps
    )
    arguments = draw(2, 5)
    own = dataclasses.replace(schedule, name="shuffled", steps=steps)
    found = pipelined("gpipe", 2, 5, arguments, schedule=own)
    assert_equal(found, sequential(5, run_stage, *arguments))


def test_bfloat16_is_summed_in_float32():
    microbatches = 8
    params, ends, tokens, labels = draw(2, microbatches, jnp.bfloat16)
    loss, _, found = pipelined("dualpipe", 2, microbatches, (params, ends, tokens, labels))
    cut = [a.reshape(microbatches, ROWS) for a in (tokens, labels)]
    each = [
        sequential(1, run_stage, params, ends, *(a[m] for a in cut)) for m in range(microbatches)
    ]

    def mean(*gradients):
        return np.mean(np.asarray(gradients, np.float32), axis=0)

    wanted = jax.tree.map(mean, *(gradients for *_, gradients in each))
    assert loss == jnp.mean(jnp.stack([one for one, *_ in each]))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert a.dtype == jnp.float32
        # half a step of bfloat16: what XLA fuses, it rounds once instead of twice
        assert np.linalg.norm(a - b) <= 2**-8 * np.linalg.norm(b)


def test_integers_among_parameters_have_no_gradient():
    def stage(params, x):
        x, report = run_stage(params["floats"], x)
        return {**x, "h": x["h"] * params["sign"].astype(jnp.float32)}, report

    floats, *others = draw(2, 4)
    sign = jnp.asarray([1, -1])
    arguments = {"floats": floats, "sign": sign}, *others
    loss, reports, (gradients, of_ends) = pipelined("dualpipe", 2, 4, arguments, stage=stage)
    assert gradients["sign"].dtype == jax.dtypes.float0
    assert gradients["sign"].shape == sign.shape

    as_floats = {"floats": floats, "sign": sign.astype(jnp.float32)}, *others
    wanted, wanted_reports, (of_floats, wanted_ends) = sequential(4, stage, *as_floats)
    assert_equal(
        (loss, reports, (gradients["floats"], of_ends)),
        (wanted, wanted_reports, (of_floats["floats"], wanted_ends)),
    )


@pytest.mark.parametrize("name", ["interleaved", "dualpipe"])
def test_stages_compute_with_what_was_prepared_once(name):
    def rounded(params):
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def stage(params, prepared, x):
        def of_rounded(p, low):
            return p + lax.stop_gradient(low.astype(p.dtype) - p)

        return run_stage(jax.tree.map(of_rounded, params, prepared), x)

    def by_itself(params, x):
        return stage(params, rounded(params), x)

    arguments = draw(stages_of(name, 2), 4)
    found = pipelined(name, 2, 4, arguments, stage=stage, prepare_fn=rounded, defer=None)
    assert_equal(found, sequential(4, by_itself, *arguments))
    assert found[0] != pipelined(name, 2, 4, arguments)[0]  # rounding changes the loss
