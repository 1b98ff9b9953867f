"""Tokens to the ranks of their experts, and the experts' outputs back (DeepEP's job).

The methods, of which all give the same:

- `"all_to_all"`: a token once to each rank of its experts, in room for as many as there can be. The
  only one that can run while something else is computed, and over two axes.
- `"all_gather"`: all tokens to all ranks, for few ranks.
- `"ragged"`: a row for each expert of a token straight to its place, and no more rows than there
  are. XLA has the collective for GPUs alone; other devices gather all.
- `"peer"`: kernels that read tokens and write sums in the memory of other GPUs. The fastest where
  one process has all GPUs of a host. All devices of the mesh have to call it together, so it must
  not stand in a branch that only some of them take. Other devices gather all.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.permutation import Permutation, num_rows, plan_permutation, unpermute
from whalejax.kernels.quantization import QuantizedArray
from whalejax.parallel.expert.exchange import Route, send, send_again, send_back
from whalejax.parallel.expert.payload import ROW_TILE, guard, payload_of
from whalejax.parallel.expert.peers import Peers, check_peers, sum_at_home
from whalejax.parallel.expert.placement import Placement
from whalejax.parallel.expert.ragged import (
    Limits,
    RaggedPlan,
    plan_ragged,
    return_ragged,
    send_ragged,
)

METHODS = ("all_to_all", "all_gather", "ragged", "peer")


class Layout(NamedTuple):
    """What a rank's tokens ask for.

    Attributes:
      tokens_per_rank: `i32[ranks]`, tokens with an expert on a rank, each counted once.
      tokens_per_expert: `i32[E]`.
    """

    tokens_per_rank: jax.Array
    tokens_per_expert: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """How tokens went, for the way back and for other tokens that go the same way.

    Attributes:
      hops: plans of what each axis is sent, the first axis first; none if all is gathered, or read
        from peers.
      local: of arrived tokens to the rows of this rank's experts, or how ragged rows get there.
      weights: `f32|f64[arrived, k]`, of arrived tokens for this rank's experts; of ragged rows,
        which are weighted at home, `[T, k]`.
      peers: who visits whom, where tokens are read from peers; else None.
      axes: names of the axes.
      rows: of this rank's experts.
    """

    hops: tuple[Permutation, ...]
    local: Permutation | RaggedPlan
    weights: jax.Array
    peers: Peers | None
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Returning:
    """Outputs of experts before their way back, for `finish_combine`.

    Attributes:
      rows: `[arrived, H]`, of each token that arrived the sum of this rank's experts; or, where the
        way back is straight, the outputs themselves.
      hops: plans of what each axis was sent, the first axis first; none if all was gathered.
      straight: the handle of a dispatch whose way back weighs the outputs: one that was ragged, or
        read from peers; else None.
      axes: names of the axes.
    """

    rows: jax.Array
    hops: tuple[Permutation, ...]
    straight: Handle | None
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})


class Dispatched(NamedTuple):
    """Tokens by the experts of this rank.

    Attributes:
      tokens: `[rows, H]`, sorted by slot, each slot's on a multiple of the alignment; or
        `[slots, max_tokens, H]`. In FP8 e4m3. Padding is zero.
      scales: in FP8 `f32[rows, ceil(H / 128)]`, or of each slot, else None.
      group_sizes: `i32[slots_per_rank]`, tokens of each slot.
      handle: for `combine`.
      overflow: `i32[]`, copies of tokens that found no place on this rank: on their way from it,
        or in the rows of its slots. 0 where nothing limits them.
      carrier: in FP8 zeros of the tokens' shape and of x's dtype, whose gradient is the tokens':
        for `fp8_grouped_linear`; else None.
      held: what was passed as `hold`.
    """

    tokens: jax.Array
    scales: jax.Array | None
    group_sizes: jax.Array
    handle: Handle
    overflow: jax.Array
    carrier: jax.Array | None = None
    held: Any = None

    def rows(self) -> jax.Array | QuantizedArray:
        """The tokens, with their scales if they are in FP8, as a grouped matmul takes them."""
        if self.scales is None:
            return self.tokens
        return QuantizedArray(self.tokens, self.scales, ROW_TILE)


def layout(topk_idx: jax.Array, placement: Placement, *, salt: jax.Array | int = 0) -> Layout:
    """Counts a rank's tokens by the ranks and the experts that they go to.

    Args:
      topk_idx: `i32[T, k]`, experts; -1 for no choice.
      placement: of the experts.
      salt: the rank's number, if replicas are to be chosen as `dispatch` does.
    """
    slots = placement.slots_of(topk_idx, salt)
    ranks = jnp.where(slots < 0, -1, slots // placement.slots_per_rank)
    there = ranks[..., None] == jnp.arange(placement.num_ranks, dtype=jnp.int32)[None, None]
    experts = jnp.arange(placement.num_experts, dtype=jnp.int32)[None, None]
    return Layout(
        jnp.sum(there.any(axis=1), axis=0, dtype=jnp.int32),
        jnp.sum(topk_idx[..., None] == experts, axis=(0, 1), dtype=jnp.int32),
    )


def dispatch(
    x: jax.Array,
    topk_idx: jax.Array | None,
    topk_weights: jax.Array | None,
    placement: Placement,
    *,
    axis: str | tuple[str, str],
    capacity: int | None = None,
    quantize: str | None = None,
    handle: Handle | None = None,
    method: str | None = None,
    alignment: int = 128,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    zero_padding: bool = True,
    hold: Any = None,
) -> Dispatched:
    """Sends each token to the ranks of its experts, once to each, and sorts what arrives.

    To be called inside `jax.shard_map`, by all ranks of the axis. Its gradient is what `combine`
    does, with weights of one, by the same handle.

    Args:
      x: `bf16|f16|f32|f64[T, H]`, this rank's tokens; T the same on all ranks.
      topk_idx: `i32[T, k]`, their experts, each at most once for a token; -1 for no choice.
      topk_weights: `f32|f64[T, k]`, their weights.
      placement: where experts are.
      axis: of the mesh; of two, `(node, expert)`, a token crosses the first once for each node
        and is sent on inside it.
      capacity: tokens from one rank to another, over each axis; all if None. Those that are too
        many are left out, and counted.
      quantize: `"fp8"` to send e4m3 with a scale for each 128 columns; gradients come back in x's
        dtype.
      handle: of an earlier dispatch of tokens that went the same way, instead of `topk_idx` and
        `topk_weights`.
      method: `"all_to_all"`, the default, or another one of `METHODS`, see this module.
      alignment: every slot's rows start on a multiple of this.
      max_rows: rows for all slots of a rank together; enough for any choice if None, which is k
        times what is sent, so that a balanced load wants a limit of its own. What is too much is
        left out, and counted.
      max_tokens: instead, rows of every slot, for decoding: `[slots, max_tokens, H]`.
      zero_padding: False leaves whatever it is in rows past a slot's tokens, where writing zeros
        takes time, as `"peer"`'s does: for computations that do not read them.
      hold: pytree of arrays that are `held` back until the tokens are ready to leave (`"ragged"`,
        `"peer"` or with a handle: until they are known), so that what is computed from them runs
        while the tokens travel, and not before.

    Raises:
      ValueError: shapes, axis, placement or method do not fit; prints them.
      NotImplementedError: `"peer"` cannot run on these GPUs; says why.

    Source: DeepEP (github.com/deepseek-ai/DeepEP), DeepSeek-V3 (arXiv 2412.19437), section 3.2.2.
    """
    axes, sizes = _axes(axis, placement)
    limits = {"capacity": capacity, "max_rows": max_rows, "max_tokens": max_tokens}
    _check_options(x, method, quantize, axes, limits)
    payload, quantized = payload_of(x, quantize), quantize is not None
    if handle is None:
        _check_shapes(x, topk_idx, topk_weights)
        limits |= {"alignment": alignment, "zero_padding": zero_padding}
        route = Route(axes, sizes, placement.slots_per_rank, quantized, **limits)
        slots = placement.slots_of(topk_idx, lax.axis_index(axes))
        choice = slots, topk_weights.astype(accumulator(x.dtype))
        if hold is not None:  # its transpose holds back the gradient of what was held
            (payload, choice), hold = lax.optimization_barrier(((payload, choice), hold))
        payload, handle, hold = _send(payload, *choice, route, method, hold)
    else:
        _check_handle(x, topk_idx, topk_weights, axes, handle)
        if hold is not None:
            payload, hold = lax.optimization_barrier((payload, hold))
        payload = _send_by(handle, payload, quantized)
    if max_tokens is not None:
        shape = (placement.slots_per_rank, max_tokens, -1)
        payload = jax.tree.map(lambda a: a.reshape(shape), payload)
    overflow = sum((hop.overflow for hop in handle.hops), handle.local.overflow)
    tokens, scales, carrier = guard(payload)
    sizes = handle.local.group_sizes
    return Dispatched(tokens, scales, sizes, handle, overflow, carrier, hold)


def combine(y: jax.Array, handle: Handle) -> jax.Array:
    """Sums the weighted outputs of each token's experts where the token came from.

    Args:
      y: `[rows, H]`, or `[slots, max_tokens, H]`: outputs in the rows of `dispatch`'s tokens.
      handle: of that dispatch.

    Returns:
      `[T, H]` in y's dtype: weighted and summed in float32 on each rank, sent in y's dtype, summed
      in float32; of float64 all in float64. Tokens without a choice are zero.

    Raises:
      ValueError: y is not of the handle's rows; prints both.
    """
    return finish_combine(start_combine(y, handle))


def start_combine(y: jax.Array, handle: Handle) -> Returning:
    """The part of `combine` before anything travels; the same arguments and errors."""
    y = y.reshape(-1, y.shape[-1])
    if y.shape[0] != handle.rows:
        raise ValueError(f"combine: y has {y.shape[0]} rows, but its handle is of {handle.rows}")
    if isinstance(handle.local, RaggedPlan) or handle.peers is not None:
        return Returning(y, handle.hops, handle, handle.axes)
    rows = unpermute(y, handle.weights, handle.local)
    return Returning(rows, handle.hops, None, handle.axes)


def finish_combine(returning: Returning) -> jax.Array:
    """The rest of `combine`: the way back, and the sums where the tokens came from.

    Rows of zeros give zeros, by whatever plan.
    """
    handle = returning.straight
    if handle is None:
        return send_back(returning.rows, returning.hops, returning.axes)
    if handle.peers is not None:
        plan = handle.weights, handle.local, handle.peers
        return sum_at_home(returning.rows, *plan, *handle.axes)
    (hop,), (axis,) = handle.hops, handle.axes
    rows = return_ragged(returning.rows, handle.local, hop.source.shape[0], axis)
    return unpermute(rows, handle.weights, hop)


def _send(payload, slots, weights, route, method, hold):
    """Plans and sends; gives the handle too, and what was held."""
    if method == "ragged":
        handle = _plan_ragged(slots, weights, route)
        return _send_by(handle, payload, route.quantized), handle, hold
    arrival = send(payload, weights, slots, route, method or METHODS[0])
    if hold is not None:
        hold, _ = lax.optimization_barrier((hold, arrival.left))
    payload, weights, hops, peers, local, _ = arrival
    return payload, Handle(hops, local, weights, peers, route.axes, local.source.shape[0]), hold


def _send_by(handle, payload, quantized):
    """Sends as a handle says."""
    if not isinstance(handle.local, RaggedPlan):
        way = handle.hops, handle.peers, handle.local, handle.axes
        return send_again(payload, *way, quantized)
    ((hop,), (axis,)) = handle.hops, handle.axes
    return send_ragged(payload, hop, handle.local, handle.rows, axis, quantized)


def _plan_ragged(slots, weights, route):
    """A handle for a row of each choice, straight to the rows of its slot."""
    ((ranks,), (axis,)), slots_per_rank = (route.sizes, route.axes), route.slots_per_rank
    hop = plan_permutation(slots, ranks * slots_per_rank, alignment=1)
    from_a_rank = route.capacity or slots.shape[0] * min(slots.shape[1], slots_per_rank)
    rows = num_rows(ranks * from_a_rank, slots_per_rank, route.alignment)
    if route.max_tokens is not None:
        rows = slots_per_rank * route.max_tokens
    elif route.max_rows is not None:
        rows = min(rows, -(-route.max_rows // route.alignment) * route.alignment)
    counts = lax.all_gather(hop.group_sizes, axis).reshape(ranks, ranks, slots_per_rank)
    limits = Limits(rows, route.alignment, route.max_tokens, route.capacity)
    plan = plan_ragged(counts, lax.axis_index(axis), limits)
    return Handle((hop,), plan, weights, None, (axis,), rows)


def _axes(axis, placement):
    """Names and sizes of the axes, which must have as many ranks as the placement."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    try:
        sizes = tuple(lax.axis_size(name) for name in axes)
    except NameError as error:
        raise ValueError(
            f"dispatch: axis={axis!r} must name axes of the mesh, inside jax.shard_map: {error}"
        ) from error
    if math.prod(sizes) != placement.num_ranks:
        raise ValueError(
            f"dispatch: placement.num_ranks={placement.num_ranks} must be the size of "
            f"axis={axis!r}, {' x '.join(map(str, sizes))}"
        )
    return axes, sizes


def _check_options(x, method, quantized, axes, limits):
    if method is not None and method not in METHODS:
        raise ValueError(f"dispatch: method={method!r} is unknown; choose from {METHODS}")
    if method is not None and method != "all_to_all" and len(axes) > 1:
        raise ValueError(f"dispatch: method={method!r} needs one axis, not {axes}")
    if quantized not in (None, "fp8"):
        raise ValueError(f"dispatch: quantize={quantized!r} must be None or 'fp8'")
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if min(given.values(), default=1) < 1 or given.keys() >= {"max_rows", "max_tokens"}:
        raise ValueError(
            f"dispatch: {', '.join(f'{name}={limit}' for name, limit in given.items())} must be "
            f"positive, and not both max_rows and max_tokens"
        )
    if method == "peer":
        check_peers(x)


def _check_handle(x, topk_idx, topk_weights, axes, handle):
    """Else tokens that a handle does not know would be zeros, and others left out."""
    if topk_idx is not None or topk_weights is not None:
        raise ValueError("dispatch: a handle stands for topk_idx and topk_weights: pass None")
    first = handle.hops[0] if handle.hops else handle.local
    ranks = 1 if handle.hops else lax.axis_size(handle.axes)
    tokens = first.row_of.shape[0] // ranks
    if axes != handle.axes or x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(
            f"dispatch: x.shape={x.shape} over axes {axes} must be [T, H] with T={tokens} over "
            f"{handle.axes}, as the handle's"
        )


def _check_shapes(x, topk_idx, topk_weights):
    shapes = [None if a is None else a.shape for a in (topk_idx, topk_weights)]
    if x.ndim != 2 or shapes[0] != shapes[1] or shapes[0] is None or len(shapes[0]) != 2:
        raise ValueError(
            f"dispatch: x.shape={x.shape} must be [T, H], topk_idx.shape={shapes[0]} and "
            f"topk_weights.shape={shapes[1]} [T, k]"
        )
    if x.shape[0] != topk_idx.shape[0]:
        raise ValueError(
            f"dispatch: x.shape={x.shape} and topk_idx.shape={topk_idx.shape} differ in T"
        )
