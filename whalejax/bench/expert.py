"""Times the local parts of expert parallelism, and predicts the rest from a model of the machine.

`python -m whalejax.bench.expert` prints one JSON line per row, a short table, and last the model's
bandwidths beside those that DeepEP publishes. The local parts are one rank's of eight, on one
device: what lies between collectives, 4096 tokens of DeepSeek-V3 each.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.bench import report
from whalejax.bench.report import Bench, ours, worst_row
from whalejax.bench.timing import rotate
from whalejax.kernels.permutation import permute, plan_permutation, unpermute
from whalejax.kernels.quantization import quantize
from whalejax.parallel.expert import Placement, Topology, predicted_us, row_bytes, traffic
from whalejax.parallel.expert.exchange import plan_hop


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of a rank, their width, experts, choices of a token, ranks."""

    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    k: int = 8
    ranks: int = 8


SMALL = Sizes(32, 128, 16, 3, 4)  # on a CPU


class Published(NamedTuple):
    """A setting of DeepEP's README, on H800: GB/s of dispatch in FP8 and of combine in bf16."""

    ranks: int
    dispatch: float
    combine: float


# Links of 200 GB/s a direction and a network of 400 Gb/s; 8 experts of a token on at most 4 nodes.
DEEPEP = (
    Published(8, 153, 158),
    Published(16, 43, 43),
    Published(32, 58, 57),
    Published(64, 51, 50),
)
LINK_GBS, NETWORK_GBS, MOST_NODES = 160.0, 50.0, 4  # what a link of 200 carries in practice


def local_parts(bench: Bench, sizes: Sizes) -> None:
    """Plans, and moves rows, on the way to other ranks and to a rank's own experts."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (sizes.tokens, sizes.hidden), jnp.bfloat16)
    topk = jax.random.uniform(keys[1], (sizes.tokens, sizes.experts)).argsort(axis=1)
    topk = topk[:, : sizes.k].astype(jnp.int32)
    weights = jax.random.uniform(keys[2], topk.shape)
    placement = Placement.uniform(sizes.experts, sizes.ranks)

    def to_ranks(topk):
        slots = placement.slots_of(topk)
        return plan_hop(slots // placement.slots_per_rank, sizes.ranks, sizes.tokens)

    def to_experts(topk):  # as many choices as a balanced rank receives, of all its experts
        local = topk % placement.slots_per_rank
        most = topk.size + 128 * placement.slots_per_rank
        return plan_permutation(local, placement.slots_per_rank, max_rows=most)

    there_and_back(bench, "ranks", to_ranks, x, topk, None)
    there_and_back(bench, "experts", to_experts, x, topk, weights)
    moved = x.size * 3 + x.size // 128 * 4
    bench.time(
        "quantise", f"{sizes.tokens}x{sizes.hidden}", [ours(quantize, rotate((x,)))], moved=moved
    )


def there_and_back(
    bench: Bench,
    name: str,
    plan_of: Callable,
    x: jax.Array,
    topk: jax.Array,
    weights: jax.Array | None,
) -> None:
    """Times a plan, rows going its way, and what comes back."""
    plan = jax.jit(plan_of)(topk)
    tokens, rows, real = x.shape[0], plan.source.shape[0], int(plan.group_sizes.sum())
    row_bytes = x.nbytes // tokens
    bench.time("plan", f"to {name}", [ours(plan_of, [(topk,)], "xla")])
    there = ours(permute, rotate((x, plan)), "xla")
    bench.time("permute", f"to {name}", [there], moved=(real + rows) * row_bytes)
    y = jax.jit(permute)(x, plan)
    back = ours(unpermute, rotate((y, weights, plan)), "xla")
    sums = jnp.sum(plan.row_of < rows, axis=1) if weights is None else weights.sum(axis=1)
    wanted = x.astype(jnp.float32) * sums[:, None].astype(jnp.float32)
    errors = {"xla": worst_row(back.call(*back.sets[0]), wanted)}
    moved = (real + tokens) * row_bytes
    bench.time("unpermute", f"from {name}", [back], moved=moved, errors=errors)


def predictions(sizes: Sizes) -> list[str]:
    """Lines of the model's bandwidths beside DeepEP's.

    Rows are counted as it counts: over the network, or of one node over links, what stays included.
    """
    lines = []
    for setting in DEEPEP:
        machine = Topology(
            num_ranks=setting.ranks,
            ranks_per_node=8,
            link_gbs=LINK_GBS,
            network_gbs=NETWORK_GBS,
        )
        topk = limited_choices(machine, sizes)
        placement = Placement.uniform(sizes.experts, setting.ranks)
        units = machine.num_nodes if machine.num_nodes > 1 else setting.ranks
        reached = np.sort(topk // (sizes.experts // units), axis=2)
        copies = 1 + np.mean(np.sum(np.diff(reached, axis=2) > 0, axis=2))  # of a token
        for op, quantized in (("dispatch", True), ("combine", False)):
            bytes_ = row_bytes(sizes.hidden, sizes.k, quantized=quantized)
            counted = traffic(topk, placement, machine, row_bytes=bytes_)
            us = predicted_us(counted, machine)
            gbs = sizes.tokens * copies * bytes_ / us / 1e3
            lines.append(
                f"EP{setting.ranks:<4}{op:<9} model {us:7.0f} us {gbs:6.0f} GB/s   DeepEP's "
                f"{getattr(setting, op):.0f} GB/s"
            )
    return lines


def limited_choices(machine: Topology, sizes: Sizes) -> np.ndarray:
    """Random experts of each token on at most `MOST_NODES` nodes, `i32[ranks, T, k]`."""
    rng = np.random.default_rng(0)
    shape = (machine.num_ranks, sizes.tokens, sizes.experts)
    scores = rng.random(shape, np.float32)
    per_node = sizes.experts // machine.num_nodes
    nodes = rng.random((*shape[:2], machine.num_nodes)).argsort(axis=2).argsort(axis=2)
    scores += np.repeat(nodes < MOST_NODES, per_node, axis=2)
    return np.argpartition(-scores, sizes.k, axis=2)[..., : sizes.k].astype(np.int32)


def main(args: Sequence[str] | None = None) -> None:
    """Times and predicts."""
    args = sys.argv[1:] if args is None else args
    bench = Bench("expert", report.parser("expert", __doc__).parse_args(args), args)
    sizes = Sizes() if jax.default_backend() == "gpu" else SMALL
    bench.ceilings()
    local_parts(bench, sizes)
    bench.table()
    print("\n".join(predictions(Sizes())))


if __name__ == "__main__":
    main()
