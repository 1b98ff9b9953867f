import numpy as np
import pytest

from whalejax.parallel.eplb import gpu_loads, rebalance_experts
from whalejax.parallel.eplb.packing import pack_apart
from whalejax.parallel.eplb.published import pack

# the example of EPLB's README and what it says comes out
LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
# experts, replicas, groups, nodes, GPUs
HIERARCHICAL = [(12, 16, 4, 2, 8), (64, 96, 8, 4, 16), (24, 32, 6, 2, 4), (32, 40, 8, 1, 8)]
GLOBAL = [(12, 16, 3, 2, 8), (10, 10, 1, 1, 5), (40, 64, 1, 4, 8), (9, 27, 1, 1, 3)]
FORCED = [(4, 24, 2, 2, 4), (3, 8, 1, 1, 1), (8, 48, 4, 2, 4)]  # more slots than experts
SIZES = HIERARCHICAL + GLOBAL + FORCED


def loads(seed, layers, experts):
    """Even and skewed loads, many ties, and an expert or a layer without any."""
    rng = np.random.default_rng(seed)
    load = np.exp(rng.normal(size=(layers, experts)) * rng.uniform(0, 3, size=(layers, 1)))
    load[1::3] = rng.integers(0, 5, size=load[1::3].shape)
    load[-1] = 0
    return load


def published_layer(load, replicas, groups, nodes, gpus):
    """The published method for one layer, in loops over float32 numbers; slots and numbers."""
    if groups % nodes:
        groups = nodes = 1
    load = np.asarray(load, np.float32)
    group_load = [part.sum() for part in np.split(load, groups)]
    slots, numbers = [], []
    for node in packed(group_load, nodes):
        size = len(load) // groups
        names = [group * size + i for group in node for i in range(size)]
        made, count = [(e, 0) for e in names], dict.fromkeys(names, 1)
        while len(made) < replicas // nodes:
            shares = [load[e] / np.float32(count[e]) for e in names]
            hot = names[int(np.argmax(shares))]
            made.append((hot, count[hot]))
            count[hot] += 1
        carried = [load[e] / np.float32(count[e]) for e, _ in made]
        for held in packed(carried, gpus // nodes):
            slots += [made[i][0] for i in held]
            numbers += [made[i][1] for i in held]
    return slots, numbers


def packed(weights, packs):
    """Items of each pack, in the order in which they came."""
    held, total = [[] for _ in range(packs)], [np.float32(0)] * packs
    if len(weights) == packs:
        return [[i] for i in range(packs)]
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        free = [p for p in range(packs) if len(held[p]) < len(weights) // packs]
        lightest = min(free, key=lambda p: total[p])
        held[lightest].append(i)
        total[lightest] = total[lightest] + weights[i]
    return held


def test_published_example():
    plan = rebalance_experts(np.array(LOAD), 16, 4, 2, 8)
    assert plan.physical_to_logical.tolist() == SLOTS
    assert plan.counts[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert plan.logical_to_physical.shape == (2, 12, 2)
    assert plan.logical_to_physical[0, [1, 7]].tolist() == [[15, 13], [3, -1]]  # as made
    assert {x.dtype for x in plan} == {np.dtype(np.int32)}


def near_ties(layers, experts):
    """Loads that float32 cannot tell apart, and such that add up beyond its 24 bits."""
    rng = np.random.default_rng(3)
    alike = 1 + rng.integers(0, 9, size=(layers, experts)) * 2.0**-26
    return np.concatenate([alike, rng.integers(2**22, 2**22 + 9, size=alike.shape)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_published_method_in_loops_gives_the_same(sizes):
    load = np.concatenate([loads(0, 12, sizes[0]), near_ties(12, sizes[0])])
    plan = rebalance_experts(load, *sizes[1:])
    for layer, by_slot in enumerate(plan.physical_to_logical.tolist()):
        slots, numbers = published_layer(load[layer], *sizes[1:])
        assert by_slot == slots
        for slot, (expert, number) in enumerate(zip(slots, numbers, strict=True)):
            assert plan.logical_to_physical[layer, expert, number] == slot


@pytest.mark.parametrize("method", ["published", "whale"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plans_are_valid(sizes, method):
    experts, replicas, groups, nodes, gpus = sizes
    plan = rebalance_experts(loads(1, 12, experts), *sizes[1:], method=method)
    assert plan.physical_to_logical.shape == (12, replicas)
    assert (plan.counts >= 1).all() and (plan.counts.sum(axis=1) == replicas).all()
    assert plan.logical_to_physical.shape == (12, experts, plan.counts.max())
    for by_slot, by_expert, counts in zip(*plan, strict=True):
        assert np.bincount(by_slot, minlength=experts).tolist() == counts.tolist()
        for expert, slots in enumerate(by_expert.tolist()):
            count = counts[expert]
            assert sorted(slots[:count]) == np.flatnonzero(by_slot == expert).tolist()
            assert set(slots[count:]) <= {-1}
        if groups % nodes == 0:
            held = [set(part) for part in np.split(by_slot // (experts // groups), nodes)]
            assert [len(h) for h in held] == [groups // nodes] * nodes
            assert set.union(*held) == set(range(groups))


@pytest.mark.parametrize("method", ["published", "whale"])
def test_integers_and_scale_do_not_matter(method):
    load = np.array(LOAD)
    plans = [rebalance_experts(x, 16, 4, 2, 8, method=method) for x in (load, load * 2.0**-40)]
    assert np.array_equal(*(p.physical_to_logical for p in plans))


def test_packing_apart_is_the_published_packing_where_that_keeps_apart():
    rng = np.random.default_rng(2)
    weight = rng.integers(1, 30, size=(2000, 12)).astype(np.float32)
    owner = np.broadcast_to(np.array([0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]), weight.shape)
    weight = np.take_along_axis(weight, owner, axis=1)
    alike, apart = pack(weight, 4), pack_apart(weight, owner, 5, 4)
    kept = distinct(alike, owner)
    assert 100 < kept.sum() < 1900
    assert np.array_equal(alike[kept], apart[kept])
    assert distinct(apart, owner).all()


def test_packing_apart_makes_way_where_greed_is_stuck():
    # packs fill with 2, 0 1 and 0 1: the last replica of 2 would have to join the first one
    weight = np.array([[4, 4, 3, 3, 8, 2.5]], np.float32)
    owner = np.array([[0, 0, 1, 1, 2, 2]])
    place = pack_apart(weight, owner, 3, 3)
    assert sorted(place[0]) == list(range(6))
    assert distinct(place, owner).all()


def distinct(place, owner):
    """Rows where no pack of three or two has an owner twice."""
    packs = 4 if place.shape[1] == 12 else 3
    by_place = np.empty_like(owner)
    np.put_along_axis(by_place, place, owner, axis=1)
    held = np.sort(by_place.reshape(len(place), packs, -1), axis=2)
    return (np.diff(held, axis=2) > 0).all(axis=(1, 2))


def test_gpu_loads_share_an_expert_among_its_replicas():
    carried = gpu_loads([[6, 3]], np.array([[0, 1, 0, 0]]), 2)
    assert carried.tolist() == [[5, 4]]


GOOD = {"load": LOAD, "num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
MIXED = [[*SLOTS[0][:-1], 5], SLOTS[1]]  # expert 5 on both nodes
MISSING = [SLOTS[0], [7, 7, *SLOTS[1][2:]]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_replicas": 15}, "num_replicas=15 must be a multiple of num_gpus=8"),
        ({"num_replicas": 8}, "num_replicas=8 is too few: each of 12 experts needs one"),
        ({"num_gpus": 0}, "num_gpus=0 must be positive"),
        ({"num_groups": 8}, "num_experts=12 must be a multiple of num_groups=8"),
        ({"num_nodes": 3}, "num_gpus=8 must be a multiple of num_nodes=3"),
        ({"load": [[1, 2, -3.5, 4]]}, r"load\[0, 2\]=-3.5 must be finite and not negative"),
        ({"load": [[1, np.nan, np.inf, 4]]}, r"load\[0, 1\]=nan .*\(2 of 4 are not\)"),
        ({"load": [[1e39, 1, 1, 1]]}, "load of layer 0 sums to 1e.39, beyond float32"),
        ({"load": [1, 2]}, r"load is int64\[2\], must be numbers \[layers, experts\]"),
        ({"load": np.ones((0, 4))}, r"load is float64\[0, 4\]"),
        ({"load": [["a"]]}, r"load is <U1\[1, 1\]"),
        ({"method": "best"}, "method='best' must be one of published, whale"),
        ({"current": SLOTS}, "method='published' plans anew"),
        ({"max_moves": 3}, "max_moves=3 counts changes from current="),
        ({"max_moves": -1, "current": SLOTS, "method": "whale"}, "max_moves=-1 must not be neg"),
        ({"current": SLOTS[:1], "method": "whale"}, r"current is int64\[1, 16\], .* \[2, 16\]"),
        ({"current": np.full((2, 16), 12), "method": "whale"}, "experts 12 to 12, .* 0 to 11"),
        ({"current": MISSING, "method": "whale"}, "no replica of expert 10 in layer 1"),
        ({"current": MIXED, "method": "whale"}, "in layer 0 the groups .* on its nodes, .* 2 on"),
    ],
)
def test_what_does_not_fit_is_printed(wrong, says):
    with pytest.raises(ValueError, match=says):
        rebalance_experts(**{**GOOD, **wrong})


def test_gpu_loads_print_what_does_not_fit():
    with pytest.raises(ValueError, match=r"load is \[1, 2\], .* \[1, 3\], .* num_gpus=2"):
        gpu_loads([[1, 2]], np.array([[0, 1, 0]]), 2)
