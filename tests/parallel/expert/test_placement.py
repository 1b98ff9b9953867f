"""Placements of several layers, stacked."""

import jax
import numpy as np
import pytest

from whalejax.parallel.expert import Placement

LAYERS = [[2, 0, 1, 0, 2, 2], [0, 1, 2, 2, 1, 0]]


def test_a_stack_has_the_placement_of_each_layer():
    stacked = Placement.from_eplb(LAYERS, 2)
    assert (stacked.num_experts, stacked.slots_per_rank, stacked.num_ranks) == (3, 3, 2)
    for layer, slots in enumerate(LAYERS):
        one = Placement.from_eplb(slots, 2)
        of_layer = jax.tree.map(lambda a, i=layer: a[i], stacked)
        jax.tree.map(np.testing.assert_array_equal, one, of_layer)
    np.testing.assert_array_equal(stacked.counts, [[2, 1, 3], [2, 2, 2]])
    np.testing.assert_array_equal(
        stacked.logical_to_physical[0], [[1, 3, -1, -1], [2, -1, -1, -1], [0, 4, 5, -1]]
    )


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ([[0, 1, 2, 0], [0, 1, 1, 0]], r"without one: \[\[1, 2\]\]"),
        ([[[0, 1]]], r"shape \(1, 1, 2\)"),
        ([[0, -1]], "smallest number: -1"),
    ],
)
def test_layers_that_lack_an_expert_are_refused(slots, says):
    with pytest.raises(ValueError, match=says):
        Placement.from_eplb(slots, 2)
