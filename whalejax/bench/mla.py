"""Times paged MLA decode, attention and merging together, and the plan apart.

`python -m whalejax.bench.mla` prints one JSON line per row and a short table last. The copy
bandwidth is measured in the same run. Caches larger than the L2 are not rotated; smaller ones are.
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.bench.timing import Candidate, measure, rotate, timer
from whalejax.kernels import mla
from whalejax.kernels.mla import reference
from whalejax.kernels.mla.api import BACKENDS
from whalejax.kernels.mla.cases import BENCHMARK_CASES, SMALL_CASES, Case, draw

COPY_ELEMENTS = 2**29  # bfloat16: 1 GiB


def compiled(function, sets, name: str) -> Candidate:
    """A candidate of a function of ours."""
    return Candidate(name, jax.jit(function).lower(*sets[0]).compile(), sets)


def worst_row(actual: jax.Array, wanted: jax.Array) -> float:
    """Largest relative error of a row."""
    wanted = wanted.astype(jnp.float32)
    error = jnp.linalg.norm(actual.astype(jnp.float32) - wanted, axis=-1)
    return float(jnp.max(error / jnp.linalg.norm(wanted, axis=-1)))


def candidates(case: Case) -> tuple[list[Candidate], dict[str, float]]:
    """What decodes a case here, and the worst row's error of each."""
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

    found = [compiled(functools.partial(decode, name), sets, name) for name in names]

    def one(arrays):
        q, table, length = (a[None] for a in arrays)
        out, _ = reference.mla_decode(
            q.astype(jnp.float32), pages, table, length, causal=True, **options
        )
        return out[0]

    pages = arrays[1].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda q, table, n: jax.lax.map(one, (q, table, n)))(
            arrays[0], *arrays[2:]
        )
    errors = {c.name: worst_row(c.call(*sets[0])[0], wanted) for c in found}
    return [*found, compiled(make_plan, [(arrays[3],)], "plan")], errors


def rows(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a case."""
    found, errors = candidates(case)
    times = measure(found, rounds=arguments.rounds, sustained_s=arguments.sustained)
    result = []
    for name, measured in times.items():
        row = {"op": "mla_decode", "case": str(case), "implementation": name} | measured.row()
        if name in errors:
            for kind in ("burst", "sustained"):
                us = row[f"{kind}_us"]
                row[f"{kind}_tflops"] = round(case.flops / us / 1e6, 1)
                row[f"{kind}_gbs"] = round(case.num_bytes / us / 1e3)
            row["worst_row_error"] = float(f"{errors[name]:.3g}")
        result.append(row)
    return result


def copy_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bandwidth of a copy."""
    size = COPY_ELEMENTS if jax.default_backend() == "gpu" else 2**20
    x = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    copy = compiled(lambda x: x + jnp.asarray(1, x.dtype), [(x,)], "copy")
    measured = measure([copy], rounds=arguments.rounds, sustained_s=arguments.sustained)
    row = {"op": "ceiling", "case": f"{x.nbytes / 2**20:.0f} MiB", "implementation": "copy"}
    row |= measured["copy"].row()
    return row | {"burst_gbs": round(2 * x.nbytes / row["burst_us"] / 1e3)}


def main(args: Sequence[str] | None = None) -> None:
    """Prints one JSON line per row, and a table."""
    parser = argparse.ArgumentParser(prog="python -m whalejax.bench.mla", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every implementation")
    parser.add_argument("--sustained", type=float, default=0.2, help="seconds of a turn under load")
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON lines")
    args = sys.argv[1:] if args is None else args
    arguments = parser.parse_args(args)
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be at least 1")
    context = {
        "timer": timer(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": " ".join(["python -m whalejax.bench.mla", *args]),
    }
    if arguments.out:
        arguments.out.write_text("")
    cases = BENCHMARK_CASES if jax.default_backend() == "gpu" else SMALL_CASES
    printed = []
    for found in ([copy_row(arguments)], *(rows(case, arguments) for case in cases)):
        for row in found:
            printed.append(row)
            line = json.dumps(row | context)
            print(line, flush=True)
            if arguments.out:  # at once: an interrupted run keeps what it measured
                with arguments.out.open("a") as file:
                    file.write(line + "\n")
    for row in printed:
        figures = " ".join(f"{row[k]:>8}" for k in ("burst_tflops", "burst_gbs") if k in row)
        us = row["burst_us"]
        print(f"{row['case']:<28}{row['implementation']:<12}{us:>9.1f} us {figures}")


if __name__ == "__main__":
    main()
