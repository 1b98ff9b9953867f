"""Times dispatch and combine over all devices of a machine, beside plain collectives.

`python -m whalejax.bench.exchange` prints one JSON line per row and a short table: 4096 tokens of
DeepSeek-V3 a rank, in bfloat16 and with an FP8 wire, and 128 tokens in decoding's layout. Times are
of the wall: calls follow each other inside one program, so that no launch from the host counts.
Bytes are counted as DeepEP does: of the rows that ranks receive, each token once for a rank, a
rank's own among them. `least` is a plain all-to-all of the bytes that all_to_all sends.
Dispatch counts from tokens and choices to experts' rows, with quantisation and plans; combine from
experts' rows to sums. In decoding's layout padding is not written where a method can leave it.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from whalejax.bench import report
from whalejax.bench.report import Bench
from whalejax.parallel.expert import Dispatched, Handle, Placement, combine, dispatch
from whalejax.parallel.expert.exchange import swap

AXIS = "expert"
METHODS = ("all_to_all", "ragged", "all_gather", "peer")
# ragged collectives turn XLA's overlap off, and NCCL serves what has no kernel of XLA's own
OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A setting: tokens of a rank, their width, experts, choices of a token, calls that are timed.

    In decoding's layout each expert has rows for `max_tokens`.
    """

    tokens: int
    hidden: int = 7168
    experts: int = 256
    k: int = 8
    max_tokens: int | None = None
    calls: int = 20

    def __str__(self):
        return f"{self.tokens}x{self.hidden} top-{self.k} of {self.experts}"


CASES = (Case(tokens=4096), Case(tokens=128, max_tokens=128, calls=100))
SMALL = (Case(tokens=32, hidden=128, experts=16, k=3, calls=2),)  # on CPUs


def draw(case: Case, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, choices and weights of all ranks, cut over the mesh."""
    rng = np.random.default_rng(0)
    tokens = case.tokens * mesh.size
    idx = np.argsort(rng.random((tokens, case.experts)), axis=1)[:, : case.k].astype(np.int32)
    x = rng.standard_normal((tokens, case.hidden), np.float32).astype(jnp.bfloat16)
    arrays = x, idx, rng.random(idx.shape, np.float32)
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(AXIS)))


def repeated(f: Callable, case: Case, mesh: Mesh, prepare: Callable | None = None) -> Callable:
    """Calls `f(x, *others)` on every rank again and again, each after the one before is done.

    What `prepare` gives, once and before, are the arguments; without it they are the arrays.
    """

    def on_rank(*arrays):
        x, *others = arrays if prepare is None else lax.optimization_barrier(prepare(*arrays))

        def call(_, x):
            done = lax.optimization_barrier(f(x, *others))  # all of it, not what is read below
            first = sum(a.reshape(-1)[0].astype(jnp.float32) for a in jax.tree.leaves(done))
            return x.at[0, 0].set(first.astype(x.dtype))

        return lax.fori_loop(0, case.calls, call, x)

    spec = PartitionSpec(AXIS)
    return jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec)


def there(
    x: jax.Array, idx: jax.Array, weights: jax.Array, *, case: Case, ranks: int, **options: Any
) -> Dispatched:
    """Dispatch."""
    placement = Placement.uniform(case.experts, ranks)
    rows = {"max_tokens": case.max_tokens, "zero_padding": False}
    if case.max_tokens is None:  # rows of a balanced load, and some more
        rows = {"max_rows": case.tokens * case.k * 5 // 4 + 128 * placement.slots_per_rank}
    sent = dispatch(x, idx, weights, placement, axis=AXIS, **rows, **options)
    return sent._replace(carrier=None)


def outputs(*arrays: jax.Array, **options: Any) -> tuple[jax.Array, Handle]:
    """What experts give, and how it gets home."""
    sent = there(*arrays, **options)
    return sent.tokens.reshape(-1, sent.tokens.shape[-1]), sent.handle


def wall_us(f: Callable, arrays: tuple, case: Case, rounds: int) -> list[float]:
    """Microseconds of a call, of some rounds."""
    compiled = (
        jax.jit(f).lower(*arrays).compile(OPTIONS if jax.default_backend() == "gpu" else None)
    )
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append((time.perf_counter() - begin) * 1e6 / case.calls)
    return times


def time_case(bench: Bench, case: Case, mesh: Mesh) -> None:
    """Rows of one setting."""
    arrays = draw(case, mesh)
    ranks = mesh.size
    reached = np.sort(np.asarray(arrays[1]) // (case.experts // ranks), axis=1)
    copies = case.tokens * (1 + np.mean(np.sum(np.diff(reached, axis=1) > 0, axis=1)))

    def row(op, method, wire, f, arrays, moved, prepare=None):
        us = wall_us(repeated(f, case, mesh, prepare), arrays, case, bench.arguments.rounds)
        median = statistics.median(us)
        values = {
            "op": op,
            "case": str(case),
            "ranks": ranks,
            "implementation": method,
            "wire": wire,
            "us": round(median, 1),
            "spread_us": round(max(us) - min(us), 1),
            "gbs_per_gpu": round(moved / median / 1e3, 1),
        }
        bench.keep(values)

    for wire, width in (("bf16", 2 * case.hidden), ("fp8", case.hidden + case.hidden // 32)):
        sent = ranks * case.tokens
        rows = jax.random.bits(jax.random.key(0), (sent * ranks, width), jnp.uint8)
        rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(AXIS)))
        swapped = functools.partial(swap, axis=AXIS)
        row("least", "all_to_all", wire, swapped, (rows,), sent * width)
        for method in METHODS:
            options = {"case": case, "ranks": ranks, "method": method}
            fp8 = {"quantize": "fp8" if wire == "fp8" else None}
            f = functools.partial(there, **options, **fp8)
            row("dispatch", method, wire, f, arrays, copies * width)
            if wire == "bf16":  # combine knows no other
                ready = functools.partial(outputs, **options)
                row("combine", method, wire, combine, arrays, copies * width, ready)


def main(args: Sequence[str] | None = None) -> None:
    """Times every case on all devices."""
    args = sys.argv[1:] if args is None else args
    bench = Bench("exchange", report.parser("exchange", __doc__).parse_args(args), args)
    bench.context["timer"] = "wall clock"
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    for case in CASES if jax.default_backend() == "gpu" else SMALL:
        time_case(bench, case, mesh)
    for row in bench.rows:
        print(
            f"{row['op']:<9}{row['case']:<28}{row['implementation']:<11}{row['wire']:<5}"
            f"{row['us']:>10.1f} us{row['gbs_per_gpu']:>8.1f} GB/s"
        )


if __name__ == "__main__":
    main()
