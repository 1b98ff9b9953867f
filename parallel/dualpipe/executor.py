"""A table run as one program on all ranks: loops over ticks, in which arrays travel and wait.

Where all ranks run a forward and a backward pass, these may overlap: what a tick reads is copied
out of its slots first, so the forward pass, which writes into slots, need not wait for the backward
pass, which reads them. In other ticks each pass is a conditional that all state goes through, one
after the other. On GPUs no buffer is copied as a whole. (XLA:CPU copies those of activations in
every turn.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from whalejax.kernels.accumulation import accumulator
from whalejax.parallel.dualpipe.moving import pick
from whalejax.parallel.dualpipe.segments import Part, Segment
from whalejax.parallel.dualpipe.slots import (
    add_to_chunk,
    added,
    at,
    exchange,
    put,
    read,
    zeros_like,
)
from whalejax.parallel.dualpipe.stage import Stage
from whalejax.parallel.dualpipe.table import NONE, Table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a tick changes. Slots are leading axes.

    Attributes:
      activations: what backward passes keep, a list of arrays `[slots, ...]`.
      inputs, gradients: pytrees of arrays that arrived, `[slots, ...]`.
      deferred: what weight gradients wait for.
      sums: gradients of the parameters, a list for each chunk; in float32 or float64.
      end_sums: the same of the ends' parameters.
      losses: `[microbatches]`, 0 where this rank has none.
      aux: sums of what stages report, for each chunk.
      loss_aux: sums of what losses report.
    """

    activations: list
    inputs: Any
    gradients: Any
    deferred: Any
    sums: tuple
    end_sums: Any
    losses: jax.Array
    aux: tuple
    loss_aux: Any


class Data(NamedTuple):
    """What no tick changes.

    Attributes:
      chunks: parameters, a list of arrays for each chunk.
      ends: parameters of what comes before the first stage and after the last.
      inputs, labels: pytrees of `[microbatches, ...]`.
      stages: `i32[chunks]`, the stages that this rank's chunks are.
    """

    chunks: tuple
    ends: Any
    inputs: Any
    labels: Any
    stages: jax.Array


class Tick(NamedTuple):
    """A tick of this rank: the table's numbers, `i32[]` each."""

    forward: Any
    backward: Any
    weight: Any
    outputs: tuple[jax.Array, ...]
    gradients: tuple[jax.Array, ...]


def run_table(
    table: Table, segments: Sequence[Segment], stage: Stage, data: Data, axis: str
) -> State:
    """Runs all ticks on this rank of `axis`, inside of a `shard_map`; gives the last state."""
    state = first_state(table, stage, data)
    rank = lax.axis_index(axis)
    for segment in segments:

        def body(state, ticks, parts=segment.parts):
            for turn, (part, tick) in enumerate(zip(parts, ticks, strict=True)):
                # else XLA runs ahead with one pass, and leaves nothing to hide the other behind
                state = lax.optimization_barrier(state)
                with jax.named_scope(f"turn{turn}"):
                    state = run_tick(part, tick, state, data, stage, axis)
            return state, None

        with jax.named_scope(f"ticks_{segment.start}_{segment.stop}"):
            state, _ = lax.scan(body, state, ticks_of(table, segment, rank))
    return state


def ticks_of(table: Table, segment: Segment, rank: jax.Array) -> tuple[Tick, ...]:
    """This rank's ticks, stacked, of each part of a segment."""

    def of_part(turn, part):
        rows = slice(segment.start + turn, segment.stop, len(segment.parts))

        def own(cells):
            return jnp.asarray(np.ascontiguousarray(cells[rows]))[:, rank]

        passes = (table.forward, table.backward, table.weight)
        lanes = (tuple(own(lane.slots) for lane in ways) for ways in (part.outputs, part.gradients))
        return Tick(*(type(cells)(*map(own, cells)) for cells in passes), *lanes)

    return tuple(of_part(turn, part) for turn, part in enumerate(segment.parts))


def first_state(table: Table, stage: Stage, data: Data) -> State:
    """Empty slots and sums."""

    def slots(number, tree):
        return jax.tree.map(lambda a: jnp.zeros((number, *a.shape), a.dtype), tree)

    def sums(tree):
        return jax.tree.map(lambda a: jnp.zeros(a.shape, accumulator(a.dtype)), tree)

    microbatches = jax.tree.leaves(data.inputs)[0].shape[0]
    return State(
        activations=slots(table.activation_slots, stage.kept),
        inputs=slots(table.input_slots, stage.x),
        gradients=slots(table.gradient_slots, stage.x),
        deferred=slots(table.deferred_slots, stage.slots),
        sums=tuple(sums(_trained(stage, chunk)) for chunk in data.chunks),
        end_sums=sums(data.ends),
        losses=jnp.zeros((microbatches,), stage.loss.dtype),
        aux=tuple(zeros_like(stage.aux) for _ in data.chunks),
        loss_aux=zeros_like(stage.loss_aux),
    )


def run_tick(part: Part, tick: Tick, state: State, data: Data, stage: Stage, axis: str) -> State:
    """One tick: reads, forward, backward, weight gradient, transfers."""
    run = _side_by_side if part.forward.always and part.backward.always else _in_turn
    return run(part, tick, state, data, stage, axis)


def _side_by_side(part, tick, state, data, stage, axis):
    """A tick of all ranks' forward and backward passes: they may overlap."""
    x, state = _take(state, "inputs", tick.forward.source)
    kept, state = _take(state, "activations", tick.backward.slot)
    dy, state = _take(state, "gradients", tick.backward.source)
    if part.weight.some:
        state = _weight_in_turn(part, tick, state, data, stage)
    with jax.named_scope("forward"):
        y, state = forward(part, tick.forward, x, state, data, stage)
    state = _send(state, "inputs", y, part.outputs, tick.outputs, axis)
    with jax.named_scope("backward"):
        dx, state = backward(part, tick.backward, kept, dy, state, data, stage)
    return _send(state, "gradients", dx, part.gradients, tick.gradients, axis)


def _in_turn(part, tick, state, data, stage, axis):
    """A tick in which some ranks skip passes: one after the other, as conditionals never overlap.

    Who skips a pass reads, adds and keeps nothing. The order is that in which slots become free.
    """

    def run_backward(state):
        kept = read(state.activations, tick.backward.slot)
        dy = read(state.gradients, tick.backward.source)
        return backward(part, tick.backward, kept, dy, state, data, stage)

    def run_forward(state):
        x = read(state.inputs, tick.forward.source)
        return forward(part, tick.forward, x, state, data, stage)

    if part.weight.some:
        state = _weight_in_turn(part, tick, state, data, stage)
    if part.backward.some:
        with jax.named_scope("backward"):
            busy = _busy(part.backward, tick.backward.microbatch)
            dx, state = _when(busy, run_backward, state, stage.x)
    if part.forward.some:
        with jax.named_scope("forward"):
            busy = _busy(part.forward, tick.forward.microbatch)
            y, state = _when(busy, run_forward, state, stage.x)
    # only now: a rank that waits for another's backward pass would go forward after it
    if part.backward.some:
        state = _send(state, "gradients", dx, part.gradients, tick.gradients, axis)
    if part.forward.some:
        state = _send(state, "inputs", y, part.outputs, tick.outputs, axis)
    return state


def _weight_in_turn(part, tick, state, data, stage):
    def run(state):
        slots = read(state.deferred, tick.weight.slot)
        return (), weight(part, tick.weight, slots, state, data, stage)

    with jax.named_scope("weight"):
        return _when(_busy(part.weight, tick.weight.microbatch), run, state, ())[1]


def forward(
    part: Part, row: Any, received: Any, state: State, data: Data, stage: Stage
) -> tuple[Any, State]:
    """The forward pass of this rank's microbatch; gives its output."""
    chunk = _chunk(part.forward, row.chunk)
    inputs = at(data.inputs, row.microbatch)
    is_first = jnp.take(data.stages, row.chunk) == 0
    x = lax.cond(is_first, lambda: stage.functions.enter(data.ends, inputs), lambda: received)
    y, kept, aux = stage.forward(_chunk_of(data.chunks, chunk), x)

    def close(end_sums):
        labels = at(data.labels, row.microbatch)
        loss, loss_aux, dy, d_ends = stage.close(data.ends, y, labels)
        return loss, loss_aux, dy, added(end_sums, d_ends)

    def skip(end_sums):
        return *zeros_like((stage.loss, stage.loss_aux, stage.x)), end_sums

    is_last = row.loss != NONE
    loss, loss_aux, dy, end_sums = lax.cond(is_last, close, skip, state.end_sums)
    state = dataclasses.replace(
        state,
        activations=put(state.activations, row.slot, kept),
        gradients=put(state.gradients, row.loss, dy, is_last),
        losses=state.losses.at[row.microbatch].add(loss),
        end_sums=end_sums,
        aux=add_to_chunk(state.aux, chunk, aux),
        loss_aux=added(state.loss_aux, loss_aux),
    )
    return y, state


def backward(
    part: Part, row: Any, kept: list, dy: Any, state: State, data: Data, stage: Stage
) -> tuple[Any, State]:
    """The backward pass of this rank's microbatch; gives its input's gradient."""
    chunk = _chunk(part.backward, row.chunk)
    parameters = _chunk_of(data.chunks, chunk)

    def whole(sums, deferred):
        dx, gradients, _ = stage.backward(parameters, kept, dy)
        return dx, add_to_chunk(sums, chunk, gradients), deferred

    def input_alone(sums, deferred):
        dx, gradients, slots = stage.backward(parameters, kept, dy)
        sums = add_to_chunk(sums, chunk, stage.without_deferred(gradients))
        return dx, sums, put(deferred, row.deferred, slots)

    given = state.sums, state.deferred
    if not part.deferred.some:
        dx, sums, deferred = whole(*given)
    elif part.deferred.always:
        dx, sums, deferred = input_alone(*given)
    else:
        dx, sums, deferred = lax.cond(row.deferred != NONE, input_alone, whole, *given)

    def enter(end_sums):
        inputs = at(data.inputs, row.microbatch)
        return added(end_sums, stage.enter_backward(data.ends, inputs, dx))

    end_sums = state.end_sums
    if jax.tree.leaves(end_sums):
        is_first = jnp.take(data.stages, row.chunk) == 0
        end_sums = lax.cond(is_first, enter, lambda sums: sums, end_sums)
    return dx, dataclasses.replace(state, sums=sums, deferred=deferred, end_sums=end_sums)


def weight(part: Part, row: Any, slots: Any, state: State, data: Data, stage: Stage) -> State:
    """The deferred weight gradients of this rank's microbatch."""
    chunk = _chunk(part.weight, row.chunk)
    gradients = stage.weight_gradients(_chunk_of(data.chunks, chunk), slots)
    return dataclasses.replace(state, sums=add_to_chunk(state.sums, chunk, gradients))


def _busy(traits, microbatch):
    """Whether this rank has something to do: True if all always have."""
    return True if traits.always else microbatch != NONE


def _chunk(traits, chunk):
    return traits.chunk if traits.chunk is not None else jnp.maximum(chunk, 0)


def _chunk_of(chunks, chunk):
    return [pick(choices, chunk) for choices in zip(*chunks, strict=True)]


def _trained(stage, parameters):
    return [parameters[key] for key in stage.functions.trained]


def _when(busy, run: Callable, state: State, shapes) -> tuple[Any, State]:
    """`run(state)`, or zeros of these shapes and the state as it was if this rank is not busy.

    The state is changed in place: buffers that go into a conditional come out of it.
    """
    if busy is True:
        return run(state)
    found = lax.cond(busy, run, lambda state: (zeros_like(shapes), state), state)
    return lax.optimization_barrier(found)  # what follows may write where this has read


def _take(state, name, slot):
    """A copy of a slot, and the state, whose later writes come after the copying."""
    buffers = getattr(state, name)
    taken, buffers = lax.optimization_barrier((read(buffers, slot), buffers))
    return taken, dataclasses.replace(state, **{name: buffers})


def _send(state, name, tree, lanes, slots, axis):
    """The state, with what arrives when every rank sends a pytree."""
    buffers = exchange(getattr(state, name), tree, lanes, slots, axis)
    return dataclasses.replace(state, **{name: buffers})
