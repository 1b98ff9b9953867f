"""The one clock of the benchmarks: kernel time on the device, candidates taking turns.

On a GPU the time of a call is the sum of its kernels' durations as CUPTI reports them, launch gaps
excluded, for JAX's kernels and for a peer's alike. On a CPU it is `perf_counter` around the call.

Power decides long kernels: under load an H100 lowers its clock by up to a quarter, so that figures
depend on what ran before. So candidates take turns, round by round, and are timed twice: "burst",
a few calls after a pause, and "sustained", without one. A chain of dependent multiply-adds after
each turn tells the clock. Arguments rotate over sets larger than the L2.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

L2_BYTES = 120_000_000  # more than twice an H100's L2
PAUSE = 0.15  # seconds of idleness after which the clock is high again
CHAIN = 20_000  # multiply-adds of the clock's probe, of 4 cycles each
CHAIN_CYCLES = 4
MOST_CALLS = 2000  # of a turn: CUPTI keeps a record of each kernel


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
      name: of the implementation.
      call: called with one set of arguments; enqueues work and returns its result.
      sets: argument sets, used in rotation.
      wait: waits for all that was enqueued; JAX's by default.
    """

    name: str
    call: Callable[..., Any]
    sets: Sequence[tuple]
    wait: Callable[[Any], Any] = jax.block_until_ready


@dataclasses.dataclass
class Times:
    """Microseconds of every call after a pause and without one, and the clock in GHz at each."""

    burst_us: list[float] = dataclasses.field(default_factory=list)
    sustained_us: list[float] = dataclasses.field(default_factory=list)
    burst_ghz: list[float] = dataclasses.field(default_factory=list)
    sustained_ghz: list[float] = dataclasses.field(default_factory=list)

    def row(self) -> dict[str, float | None]:
        """Medians and spreads, for a JSON row."""
        result = {}
        for kind in ("burst", "sustained"):
            us, ghz = getattr(self, f"{kind}_us"), getattr(self, f"{kind}_ghz")
            result[f"{kind}_us"] = round(statistics.median(us), 2)
            result[f"{kind}_spread_us"] = round(max(us) - min(us), 2)
            result[f"{kind}_ghz"] = round(statistics.median(ghz), 2) if ghz else None
        return result


def rotate(arguments: tuple, *, at_least: int = 2) -> list[tuple]:
    """Copies of `arguments`, enough that together they exceed the L2; on a CPU just the one."""
    if jax.default_backend() != "gpu":
        return [arguments]
    size = sum(x.nbytes for x in jax.tree.leaves(arguments))
    copies = max(at_least, -(-L2_BYTES // max(size, 1)))
    return [arguments, *(jax.tree.map(jnp.copy, arguments) for _ in range(copies - 1))]


def timer() -> str:
    """What `measure` measures, for a JSON row."""
    return "CUPTI kernel time" if jax.default_backend() == "gpu" else "perf_counter"


def measure(
    candidates: Sequence[Candidate],
    *,
    rounds: int = 3,
    calls: int = 10,
    sustained_s: float = 0.2,
) -> dict[str, Times]:
    """Times candidates in turn, every other round backwards: heat goes from one to the next.

    Args:
      candidates: compiled already; each is called once more before it is timed.
      rounds: turns of each candidate, of each kind.
      calls: timed calls of a burst, after one that is not counted.
      sustained_s: about how long a turn without a pause lasts; its second half is counted.

    Returns:
      `Times` by name.
    """
    times = {c.name: Times() for c in candidates}
    on_gpu = jax.default_backend() == "gpu"
    turn = _turn_on_gpu if on_gpu else _turn_on_cpu
    orders = [candidates[::-1] if i % 2 else candidates for i in range(rounds)]
    for order in orders:
        for candidate in order:
            time.sleep(PAUSE if on_gpu else 0)
            us, ghz = turn(candidate, calls)
            times[candidate.name].burst_us += us
            times[candidate.name].burst_ghz += ghz
    for order in orders:
        for candidate in order:
            typical = statistics.median(times[candidate.name].burst_us)
            many = (
                max(calls, min(MOST_CALLS, int(sustained_s * 1e6 / typical))) if on_gpu else calls
            )
            us, ghz = turn(candidate, many)
            times[candidate.name].sustained_us += us[len(us) // 2 :]
            times[candidate.name].sustained_ghz += ghz
    return times


def _turn_on_cpu(candidate, calls):
    us = []
    for i in range(calls + 1):
        begin = time.perf_counter()
        candidate.wait(candidate.call(*candidate.sets[i % len(candidate.sets)]))
        us.append((time.perf_counter() - begin) * 1e6)
    return us[1:], []


def _turn_on_gpu(candidate, calls):
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    probe, one = _clock_probe()
    cupti._cupti_init()
    for i in range(calls + 1):
        result = candidate.call(*candidate.sets[i % len(candidate.sets)])
    candidate.wait(result)
    probe(one).block_until_ready()
    *kernels, (_, probe_ms) = cupti._cupti_get_timings(True)
    per_call, rest = divmod(len(kernels), calls + 1)
    if rest or not per_call:
        raise RuntimeError(
            f"{candidate.name}: {len(kernels)} kernels in {calls + 1} calls: calls differ, so "
            f"their times cannot be told apart; kernels: {sorted({name for name, _ in kernels})}"
        )
    ms = [ms for _, ms in kernels]
    us = [1e3 * sum(ms[i : i + per_call]) for i in range(per_call, len(ms), per_call)]
    return us, [CHAIN_CYCLES * CHAIN / probe_ms / 1e6]


@functools.cache
def _clock_probe():
    """One CTA that runs a chain of dependent multiply-adds, compiled, and its argument."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def clock_probe(x, out):
        y = jax.lax.fori_loop(0, CHAIN, lambda i, y: y * 0.999 + 0.001, x[0])
        ones = plgpu.layout_cast(
            jnp.full((128,), 1.0, jnp.float32), plgpu.Layout.WG_STRIDED((128,), 1)
        )
        out[...] = ones * y

    kernel = plgpu.kernel(
        clock_probe,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    one = jnp.ones(1, jnp.float32)
    compiled = jax.jit(kernel).lower(one).compile()
    compiled(one).block_until_ready()
    return compiled, one
