import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.dualpipe import SCHEDULES, make_schedule
from whalejax.parallel.dualpipe.moving import from_chunks, plan_moves, to_chunks
from whalejax.parallel.dualpipe.segments import align_chunks
from whalejax.parallel.dualpipe.table import tabulate

STAGE = PartitionSpec("stage")


def stages_of(name, ranks, chunks=3):
    chunks = chunks if name == "interleaved" else 1
    schedule = make_schedule(name, ranks, 6 * ranks, chunks_per_rank=chunks)
    return align_chunks(tabulate(schedule)).stages


def on_ranks(f, ranks, *arguments):
    mesh = jax.make_mesh(
        (ranks,), ("stage",), devices=jax.devices()[:ranks], axis_types=(AxisType.Auto,)
    )
    over = jax.shard_map(f, mesh=mesh, in_specs=STAGE, out_specs=STAGE, check_vma=False)
    return jax.jit(over)(*arguments)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_sends_and_receives_at_most_once_a_round(name, ranks):
    stages = stages_of(name, ranks)
    stored = (stages.max() + 1) // ranks
    rounds = plan_moves(stages)
    for moves in rounds:
        for end in ("source", "destination"):
            there = [getattr(move, end) for move in moves]
            assert len(set(there)) == len(there)
        assert len({move.source == move.destination for move in moves}) == 1
    found = {(m.destination, m.chunk): m.source * stored + m.slot for ms in rounds for m in ms}
    assert found == {place: stage.item() for place, stage in np.ndenumerate(stages)}
    assert sum(map(len, rounds)) == stages.size
    transfers = [m for m in rounds if m[0].source != m[0].destination]
    assert len(transfers) <= stages.shape[1] * 2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_stages_arrive_where_they_run(name, ranks):
    stages = stages_of(name, ranks)
    number = int(stages.max()) + 1
    leaves = [jnp.arange(1, number + 1), jnp.arange(3.0 * number).reshape(number, 3)]

    def move(leaves):
        chunks = to_chunks(leaves, plan_moves(stages), "stage", stages.shape[1])
        return jax.tree.map(lambda *c: jnp.stack(c)[None], *chunks)

    found = on_ranks(move, ranks, leaves)
    for leaf, moved in zip(leaves, found, strict=True):
        np.testing.assert_array_equal(moved, np.asarray(leaf)[stages])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gradients_of_all_copies_are_summed_where_a_stage_is_stored(name, ranks):
    stages = stages_of(name, ranks)
    number = int(stages.max()) + 1
    copies = stages.size // number
    assert copies == (2 if name == "dualpipe" else 1)
    # a power of two for every place: a sum tells its terms
    terms = 2.0 ** np.arange(stages.size, dtype=np.float32).reshape(stages.shape)
    leaf = jnp.asarray(terms)[..., None] * jnp.ones((1, 1, 3))
    back = functools.partial(
        from_chunks, rounds=plan_moves(stages), axis="stage", stored=number // ranks
    )

    def move(leaf):
        return back([[chunk] for chunk in leaf[0]])[0]

    wanted = np.zeros(number, np.float32)
    np.add.at(wanted, stages.ravel(), terms.ravel())
    found = on_ranks(move, ranks, leaf)
    np.testing.assert_array_equal(found, np.broadcast_to(wanted[:, None], (number, 3)))
