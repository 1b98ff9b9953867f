"""Times paged MLA decode, attention and merging together, and the plan apart.

`python -m whalejax.bench.mla` prints one JSON line per row and a short table last. The copy
bandwidth and a product in bfloat16 are measured in the same run, FlashMLA where it is installed.
Caches larger than the L2 are not rotated; smaller ones are.
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from whalejax.bench import peers, report
from whalejax.bench.report import Bench, ours, untimed, worst_row
from whalejax.bench.timing import Candidate, rotate
from whalejax.kernels import mla
from whalejax.kernels.mla.api import BACKENDS
from whalejax.kernels.mla.cases import BENCHMARK_CASES, SMALL_CASES, Case, draw

CHECKED = 4  # sequences whose results are compared with the definition


def candidates(case: Case) -> tuple[list[Candidate], Candidate, dict[str, float]]:
    """What decodes a case here, what plans it, and the worst row's error of each of the first."""
    on_gpu = jax.default_backend() == "gpu"
    # XLA multiplies no bfloat16 into float32 on a CPU
    arrays = draw(case, jax.random.key(0), "bfloat16" if on_gpu else "float32")
    options = {"v_dim": case.v_dim, "scale": (case.v_dim + case.rope) ** -0.5}
    # the kernel is one for GPUs, and XLA gathers a cache of full size into another
    names = ["mosaic_gpu"] if on_gpu else [name for name in BACKENDS if name != "mosaic_gpu"]
    workers = mla.mla_workers(case.s_q, case.heads)
    make_plan = functools.partial(mla.plan_mla_decode, workers=workers)
    plan = jax.jit(make_plan)(arrays[3])
    sets = rotate((*arrays, plan), at_least=1)

    def decode(name, q, kv_pages, table, lengths, plan):
        return mla.mla_decode(
            q, kv_pages, table, lengths, plan=plan, implementation=name, **options
        )

    found = [ours(functools.partial(decode, name), sets, name) for name in names]
    if on_gpu and not case.fp8:
        found += peers.mla(sets, **options)
    wanted = definition(arrays, options)
    errors = {c.name: worst_row(out_of(c)[:CHECKED], wanted) for c in found}
    return found, ours(make_plan, [(arrays[3],)], "plan"), errors


def definition(arrays: tuple, options: dict) -> jax.Array:
    """The output of the first sequences, in float32."""

    def decode(q, pages, table, lengths):
        few = q[:CHECKED].astype(jnp.float32), table[:CHECKED], lengths[:CHECKED]
        whole = pages.dequantize() if isinstance(pages, mla.FP8Pages) else pages
        keys = whole.astype(jnp.float32)
        out, _ = mla.mla_decode(few[0], keys, *few[1:], implementation="xla", **options)
        return out

    with jax.default_matmul_precision("highest"):
        return untimed(decode)(*arrays)


def out_of(candidate: Candidate) -> jax.Array:
    """What a candidate decodes."""
    out, _ = candidate.call(*candidate.sets[0])
    candidate.wait(out)
    return out if isinstance(out, jax.Array) else jax.dlpack.from_dlpack(out.contiguous())


def main(args: Sequence[str] | None = None) -> None:
    """Times all cases."""
    args = sys.argv[1:] if args is None else args
    bench = Bench("mla", report.parser("mla", __doc__).parse_args(args), args)
    bench.ceilings()
    for case in BENCHMARK_CASES if jax.default_backend() == "gpu" else SMALL_CASES:
        decode, plan, errors = candidates(case)
        sizes = {"flops": case.flops, "moved": case.num_bytes}
        bench.time("mla_decode", str(case), decode, errors=errors, **sizes)
        bench.time("mla_decode", str(case), [plan])
    bench.table()


if __name__ == "__main__":
    main()
