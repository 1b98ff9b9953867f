"""What a benchmark prints: a JSON line a row at once, and a short table last."""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.bench.timing import Candidate, Times, measure, timer

KINDS = ("burst", "sustained")
UNITS = {"tflops": "TFLOP/s", "gbs": "GB/s"}
COPY_ELEMENTS = 2**29  # bfloat16: 1 GiB


def at_least_one(text: str) -> int:
    """A number of turns."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, `python -m whalejax.bench.NAME`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m whalejax.bench.{name}", description=description
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=3, help="turns of every implementation"
    )
    parser.add_argument("--sustained", type=float, default=0.2, help="seconds of a turn under load")
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON lines")
    return parser


class Bench:
    """Collects rows: prints each as JSON, and all of them as a table at the end.

    Attributes:
      arguments: what `parser` found on the command line; only then is a file begun.
      rows: so far.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, args: Sequence[str]):
        self.arguments = arguments
        if self.arguments.out:  # a path that cannot be written fails before anything is timed
            self.arguments.out.write_text("")
        self.rows: list[dict[str, Any]] = []
        self.context = {
            "timer": timer(),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "command": " ".join([f"python -m whalejax.bench.{name}", *args]),
        }

    def time(
        self,
        op: str,
        case: str,
        found: list[Candidate],
        *,
        flops: float = 0,
        moved: float = 0,
        errors: dict[str, float] | None = None,
    ) -> dict[str, Times]:
        """Times candidates in turn and keeps a row of each."""
        times = measure(found, rounds=self.arguments.rounds, sustained_s=self.arguments.sustained)
        for name, measured in times.items():
            row = {"op": op, "case": case, "implementation": name} | measured.row()
            for kind in KINDS:
                us = row[f"{kind}_us"]
                row[f"{kind}_tflops"] = round(flops / us / 1e6, 1) if flops else None
                row[f"{kind}_gbs"] = round(moved / us / 1e3) if moved else None
            if errors and name in errors:
                row["worst_row_error"] = float(f"{errors[name]:.3g}")
            self.keep(row)
        return times

    def keep(self, row: dict[str, Any]) -> None:
        """Keeps a row and prints it, and writes it at once: an interrupted run keeps its rows."""
        self.rows.append(row)
        line = json.dumps(row | self.context)
        print(line, flush=True)
        if self.arguments.out:
            with self.arguments.out.open("a") as file:
                file.write(line + "\n")

    def ceilings(self) -> None:
        """Times what there is: a copy, for its bandwidth, and a product in bfloat16."""
        on_gpu = jax.default_backend() == "gpu"
        x = jax.random.normal(
            jax.random.key(0), (COPY_ELEMENTS if on_gpu else 2**20,), jnp.bfloat16
        )
        copy = ours(lambda x: x + jnp.asarray(1, x.dtype), [(x,)], "copy")
        self.time("ceiling", f"{x.nbytes / 2**20:.0f} MiB", [copy], moved=2 * x.nbytes)
        size = 8192 if on_gpu else 512
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (1, 2))
        matmul = ours(lambda a, b: a @ b.T, [(a, b)], "xla bf16", CUBLAS)
        self.time("ceiling", f"{size}x{size}x{size}", [matmul], flops=2 * size**3)

    def table(self) -> None:
        """Prints the rows, in each unit that they have a figure in: burst, then sustained."""
        for row in self.rows:
            figures = [
                f"{row[f'burst_{unit}']:>8} {row[f'sustained_{unit}']:>7} {name}"
                for unit, name in UNITS.items()
                if row[f"burst_{unit}"] is not None
            ]
            print(
                f"{row['op']:<11}{row['case']:<30}{row['implementation']:<20}"
                f"{row['burst_us']:>9.1f} us" + "".join(figures)
            )


def worst_row(actual: jax.Array, wanted: jax.Array) -> float:
    """The worst of `kernels.testing.row_errors`, in float32, computed where the arrays are."""
    wanted = wanted.astype(jnp.float32)
    size = jnp.linalg.norm(wanted, axis=-1)
    error = jnp.linalg.norm(actual.astype(jnp.float32) - wanted, axis=-1)
    return float(jnp.max(jnp.where(error == 0, 0, error / size)))


# Of XLA's own matmuls: among cuBLAS' algorithms it chooses in seconds, with Triton's in minutes.
CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 4}


def ours(f: Callable, sets: list[tuple], name: str = "whalejax", options: Any = None) -> Candidate:
    """A candidate of a function of ours, compiled with XLA's `options`."""
    return Candidate(name, jax.jit(f).lower(*sets[0]).compile(options), sets)


def untimed(f: Callable) -> Callable:
    """`jax.jit` of what errors are measured by: not tuned, which would take longer than to run."""
    return jax.jit(f, compiler_options={"xla_gpu_autotune_level": 0})
