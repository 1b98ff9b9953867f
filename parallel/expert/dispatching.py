"""Tokens to the ranks of their experts, and the experts' outputs back (DeepEP's job)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.permutation import Permutation, permute, plan_permutation, unpermute
from whalejax.kernels.quantization import quantize
from whalejax.parallel.expert.exchange import exchange, plan_hop
from whalejax.parallel.expert.placement import Placement

METHODS = ("all_to_all", "all_gather")
ROW_TILE = (1, 128)  # of an FP8 row's scales


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
      hops: plans of what each axis is sent, the first axis first; none if all is gathered.
      local: of arrived tokens to the rows of this rank's experts.
      weights: `f32[arrived, k]`, of arrived tokens for this rank's experts.
      axes: names of the axes.
    """

    hops: tuple[Permutation, ...]
    local: Permutation
    weights: jax.Array
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
    """

    tokens: jax.Array
    scales: jax.Array | None
    group_sizes: jax.Array
    handle: Handle
    overflow: jax.Array


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
) -> Dispatched:
    """Sends each token to the ranks of its experts, once to each, and sorts what arrives.

    To be called inside `jax.shard_map`, by all ranks of the axis. Its gradient is what `combine`
    does, with weights of one, by the same handle.

    Args:
      x: `bf16|f16|f32|f64[T, H]`, this rank's tokens; T the same on all ranks.
      topk_idx: `i32[T, k]`, their experts, each at most once for a token; -1 for no choice.
      topk_weights: `f32[T, k]`, their weights.
      placement: where experts are.
      axis: of the mesh; of two, `(node, expert)`, a token crosses the first once for each node
        and is sent on inside it.
      capacity: tokens from one rank to another, over each axis; all if None. Those that are too
        many are left out, and counted.
      quantize: `"fp8"` to send e4m3 with a scale for each 128 columns, which has no gradient yet.
      handle: of an earlier dispatch of tokens that went the same way, instead of `topk_idx` and
        `topk_weights`.
      method: `"all_to_all"`, the default, or `"all_gather"`, which sends all to all, for few ranks.
      alignment: every slot's rows start on a multiple of this.
      max_rows: rows for all slots of a rank together; enough for any choice if None, which is k
        times what is sent, so that a balanced load wants a limit of its own. What is too much is
        left out, and counted.
      max_tokens: instead, rows of every slot, for decoding: `[slots, max_tokens, H]`.

    Raises:
      ValueError: shapes, axis, placement or method do not fit; prints them.
      NotImplementedError: a gradient through `quantize="fp8"` is taken.

    Source: DeepEP (github.com/deepseek-ai/DeepEP), DeepSeek-V3 (arXiv 2412.19437), section 3.2.2.
    """
    axes, sizes = _axes(axis, placement)
    _check_options(method, quantize, capacity)
    if handle is None:
        _check_shapes(x, topk_idx, topk_weights)
    else:
        _check_handle(x, topk_idx, topk_weights, axes, handle)
    payload = _payload(x, quantize)
    if handle is None:
        slots = placement.slots_of(topk_idx, lax.axis_index(axes))
        weights = topk_weights.astype(jnp.float32)
        send = _gather if method == "all_gather" else _send
        payload, slots, weights, hops = send(
            payload, slots, weights, placement, axes, sizes, capacity
        )
        local_slots = slots - lax.axis_index(axes) * placement.slots_per_rank
        here = (local_slots >= 0) & (local_slots < placement.slots_per_rank)
        local = plan_permutation(
            jnp.where(here, local_slots, -1),
            placement.slots_per_rank,
            alignment=alignment,
            capacity=max_tokens,
            max_rows=max_rows,
        )
        handle = Handle(hops, local, weights, axes)
    else:
        payload = _resend(payload, handle)
    arrived = [permute(part, handle.local) for part in payload]
    if max_tokens is not None:
        arrived = [a.reshape(placement.slots_per_rank, max_tokens, -1) for a in arrived]
    overflow = sum((hop.overflow for hop in handle.hops), handle.local.overflow)
    tokens, scales = (*arrived, None)[:2]
    return Dispatched(tokens, scales, handle.local.group_sizes, handle, overflow)


def combine(y: jax.Array, handle: Handle) -> jax.Array:
    """Sums the weighted outputs of each token's experts where the token came from.

    Args:
      y: `[rows, H]`, or `[slots, max_tokens, H]`: outputs in the rows of `dispatch`'s tokens.
      handle: of that dispatch.

    Returns:
      `[T, H]` in y's dtype: weighted and summed in float32 on each rank, sent in y's dtype, summed
      in float32. Tokens without a choice are zero.

    Raises:
      ValueError: y is not of the handle's rows; prints both.
    """
    y = y.reshape(-1, y.shape[-1])
    if y.shape[0] != handle.local.source.shape[0]:
        raise ValueError(
            f"combine: y has {y.shape[0]} rows, but its handle is of {handle.local.source.shape[0]}"
        )
    rows = unpermute(y, handle.weights, handle.local)
    if not handle.hops:
        total = lax.psum_scatter(rows.astype(jnp.float32), handle.axes, tiled=True)
        return total.astype(y.dtype)
    for axis, hop in zip(reversed(handle.axes), reversed(handle.hops), strict=True):
        (rows,), _ = exchange((rows,), (), axis)
        rows = unpermute(rows, None, hop)
    return rows


def _payload(x, quantized):
    """What of x is sent."""
    if quantized is None:
        return (x,)
    rows = quantize(_without_gradient(x), ROW_TILE)
    return rows.values, rows.scales


@jax.custom_vjp
def _without_gradient(x):
    return x


def _refuse(*_):
    raise NotImplementedError(
        "dispatch: quantize='fp8' has no gradient yet; dispatch in bfloat16 to train"
    )


_without_gradient.defvjp(_refuse, _refuse)


def _send(payload, slots, weights, placement, axes, sizes, capacity):
    """Sends tokens, slots and weights over one axis after another; returns the plans too."""
    hops = []
    for i, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        behind = placement.slots_per_rank * math.prod(sizes[i + 1 :])  # slots of a rank of the axis
        destination = jnp.where(slots < 0, -1, slots // behind % size)
        hop = plan_hop(destination, size, capacity or slots.shape[0])
        payload, weights, slots = _over(axis, hop, payload, weights, slots)
        here = slots // behind == lax.axis_index(axes[: i + 1])
        slots = jnp.where((slots >= 0) & here, slots, -1)
        hops.append(hop)
    return payload, slots, weights, tuple(hops)


def _over(axis, hop, payload, weights, slots):
    """Sends by a plan: what is differentiable, and what is not."""
    token = hop.source // hop.row_of.shape[1]
    slots = slots.at[token].get(mode="fill", fill_value=-1)
    weights = permute(weights, hop)
    rows = tuple(permute(part, hop) for part in payload)
    if len(rows) > 1:  # FP8 and scales
        (weights,), (slots, *rows) = exchange((weights,), (slots, *rows), axis)
    else:
        (weights, *rows), (slots,) = exchange((weights, *rows), (slots,), axis)
    return tuple(rows), weights, slots


def _gather(payload, slots, weights, placement, axes, sizes, capacity):
    """Sends everything to all ranks."""
    del placement, sizes, capacity

    def gather(a):
        return lax.all_gather(a, axes, tiled=True)

    return tuple(map(gather, payload)), gather(slots), gather(weights), ()


def _resend(payload, handle):
    """Sends other tokens as those of a handle went."""
    if not handle.hops:
        return tuple(lax.all_gather(part, handle.axes, tiled=True) for part in payload)
    for axis, hop in zip(handle.axes, handle.hops, strict=True):
        rows = tuple(permute(part, hop) for part in payload)
        if len(rows) > 1:
            _, payload = exchange((), rows, axis)
        else:
            payload, _ = exchange(rows, (), axis)
    return payload


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


def _check_options(method, quantized, capacity):
    if method is not None and method not in METHODS:
        raise ValueError(f"dispatch: method={method!r} is unknown; choose from {METHODS}")
    if quantized not in (None, "fp8"):
        raise ValueError(f"dispatch: quantize={quantized!r} must be None or 'fp8'")
    if capacity is not None and capacity < 1:
        raise ValueError(f"dispatch: capacity={capacity} must be positive")


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
