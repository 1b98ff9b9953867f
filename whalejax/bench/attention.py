"""Times attention forward and with its gradients, for every backend that this machine can run.

`python -m whalejax.bench.attention` prints one JSON line per row, and to stderr why a backend is
left out. The peer `jax.nn` is `jax.nn.dot_product_attention` on cuDNN, whose values must be padded
to the width of the keys. Implementations of a case take turns, so that a clock that drifts drifts
for all; with MLA's sizes q alone is larger than an H100's L2, 50 MB, so that nothing stays in it.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.kernels.attention import attention, reference
from whalejax.kernels.attention.api import BACKENDS
from whalejax.kernels.attention.cases import BENCHMARK_CASES, SMALL_BENCHMARK_CASES, Case, draw
from whalejax.kernels.backend import choose

CALLS = 10  # enqueued before waiting, so that the host is not in the way
TIMER = f"perf_counter around {CALLS} enqueued calls"
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989}  # dense bf16, NVIDIA's data sheet


def implementations(case: Case, arrays: tuple[jax.Array, ...]) -> Iterator[tuple[str, Callable]]:
    """Names and functions of q, k and v that can run a case here; the others' reasons to stderr."""
    for name in BACKENDS:
        try:
            choose("attention", BACKENDS, name, *arrays[:3], case.causal)
        except NotImplementedError as reason:
            print(f"{case}: {reason}", file=sys.stderr)
            continue
        yield (
            name,
            functools.partial(attention, scale=case.scale, causal=case.causal, implementation=name),
        )
    if jax.default_backend() == "gpu" and arrays[0].dtype.itemsize == 2:
        yield "jax.nn", functools.partial(_peer, scale=case.scale, causal=case.causal)


def _peer(q, k, v, *, scale, causal):
    d_v = v.shape[3]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - d_v)))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )
    return out[..., :d_v]


def expected(case: Case, arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output and gradients by the definition in float32, one sequence and head at a time."""

    @jax.jit
    def one(q, k, v, d_out):
        out, lse = reference.forward(q, k, v, case.scale, case.causal)
        return out, reference.backward(q, k, v, out, lse, d_out, case.scale, case.causal)

    results = [np.empty(x.shape, np.float32) for x in (arrays[3], *arrays[:3])]
    with jax.default_matmul_precision("highest"):  # a GPU's default for float32 is TF32
        for b, h in np.ndindex(case.batch, case.heads):
            parts = (x[b : b + 1, :, h : h + 1].astype(jnp.float32) for x in arrays)
            out, gradients = one(*parts)
            for result, part in zip(results, (out, *gradients), strict=True):
                result[b, :, h] = np.asarray(part)[0, :, 0]
    return results[0], results[1:]


def worst_row_error(actual: jax.Array, wanted: np.ndarray, *, relative_to: str) -> float:
    """Largest error of a row relative to that row, or to the largest row of the array.

    Gradients of rows that cancel, such as that of a query with one key, are rounding alone.
    """
    difference = np.linalg.norm(np.asarray(actual, np.float32) - wanted, axis=-1)
    size = np.linalg.norm(wanted, axis=-1)
    return float(np.max(difference / (size if relative_to == "row" else size.max())))


def times_us(functions: dict[str, Callable], arrays: tuple, repeats: int) -> dict[str, list[float]]:
    """Microseconds per call of every repeat, the functions taking turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                result = function(*arrays)
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return times


def rows(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    """Measurements of a case: forward, then forward and gradients, for each implementation."""
    arrays = draw(case, jax.random.key(0))
    found = dict(implementations(case, arrays))
    wanted_out, wanted_gradients = expected(case, arrays)

    def both(attend):
        def out_and_gradients(q, k, v, d_out):
            out, pull = jax.vjp(attend, q, k, v)
            return out, pull(d_out)

        return out_and_gradients

    def forward_error(out):
        return worst_row_error(out, wanted_out, relative_to="row")

    def both_error(result):
        pairs = zip(result[1], wanted_gradients, strict=True)
        errors = (worst_row_error(x, y, relative_to="largest row") for x, y in pairs)
        return max(forward_error(result[0]), *errors)

    flops = case.forward_flops + case.backward_flops
    for op, wrap, inputs, num_flops, error in (
        ("attention", lambda attend: attend, arrays[:3], case.forward_flops, forward_error),
        ("attention and gradients", both, arrays, flops, both_error),
    ):
        functions = {name: jax.jit(wrap(attend)) for name, attend in found.items()}
        # the first call compiles; its result is what is judged
        errors = {name: error(function(*inputs)) for name, function in functions.items()}
        for name, us in times_us(functions, inputs, repeats).items():
            median = statistics.median(us)
            tflops = num_flops / median / 1e6
            peak = PEAK_TFLOPS.get(jax.devices()[0].device_kind)
            yield {
                "op": op,
                "case": str(case),
                "implementation": name,
                "dtype": case.dtype,
                "median_us": round(median, 1),
                "spread_us": round(max(us) - min(us), 1),
                "tflops": round(tflops, 3),
                "fraction_of_peak": round(tflops / peak, 3) if peak else None,
                "worst_row_error": float(f"{errors[name]:.3g}"),
            }


def main(args: Sequence[str] | None = None) -> None:
    """Prints one JSON line per row."""
    parser = argparse.ArgumentParser(prog="python -m whalejax.bench.attention", description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--repeats", type=int, default=7, help=f"timings of {CALLS} calls each")
    arguments = parser.parse_args(args := sys.argv[1:] if args is None else args)
    if arguments.repeats < 1:
        parser.error(f"--repeats={arguments.repeats} must be at least 1")
    context = {
        "timer": TIMER,
        "repeats": arguments.repeats,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": " ".join(["python -m whalejax.bench.attention", *args]),
    }
    for case in SMALL_BENCHMARK_CASES if arguments.small else BENCHMARK_CASES:
        for row in rows(case, arguments.repeats):
            print(json.dumps(row | context), flush=True)


if __name__ == "__main__":
    main()
