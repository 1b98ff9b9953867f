"""Times whole training steps through pipelines over all devices, beside what `predict` says.

`python -m whalejax.bench.schedules` builds a model of MoE layers of DeepSeek-V3, each with eight
experts that every token visits, and takes its gradient as training does, on 2048 tokens a device
and microbatch. A row of a schedule on a mesh has the step's time by the wall, what
`whalejax.parallel.dualpipe.predict` makes of the passes' times on the same mesh, and what these add
up to if all ranks wait for the slowest in each tick. One more step is profiled: which fraction of
the time of its all-to-alls hides behind computation.

Programs are compiled side by side; one that takes too long is reported and left out, and so is a
schedule whose loss or gradient differs from the first one's. GPUs need most of their memory:
XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from whalejax.bench import report
from whalejax.bench.pipeline import PARTS, one_layer
from whalejax.bench.report import Bench, at_least_one
from whalejax.bench.schedules.compiling import Compiling
from whalejax.bench.schedules.hiding import gpu_planes, hidden, kernels_of, profile
from whalejax.bench.schedules.lockstep import lockstep_s
from whalejax.bench.schedules.passes import in_ms, time_passes
from whalejax.bench.schedules.programs import CHUNKS, Case, Named, programs_of
from whalejax.model.decoder import REMATERIALISATION, Execution
from whalejax.model.linear import PRECISIONS
from whalejax.parallel.dualpipe import StageTimes, predict
from whalejax.parallel.dualpipe.table import tabulate
from whalejax.parallel.mesh import STAGE, MeshConfig, make_mesh
from whalejax.parallel.runtime import overlap_options
from whalejax.presets import preset

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved+overlap")
KNOWN = (*SCHEDULES, "gpipe", "interleaved")
# of a schedule's loss and gradient from the first one's: other sums of bfloat16, same numbers
TOLERANCE = 1e-2
# with XLA's Triton matmuls a step through DualPipe takes minutes to compile
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
Programs = dict[str, Compiling | Exception]


def default_meshes(devices: int) -> list[str]:
    """Two ranks of experts where there are enough devices; of few, also all of them as stages."""
    found = [f"stage={devices // 2},expert=2"] if devices >= 4 and devices % 2 == 0 else []
    return ([f"stage={devices}"] if devices <= 4 else []) + found or [f"stage={devices}"]


def make_case(arguments: argparse.Namespace, mesh: str, precision: str) -> Case:
    """What the command line asks for, on one mesh and in one precision.

    Raises:
      ValueError: the mesh needs more devices than there are, or has no stages; prints it.
    """
    config = dataclasses.replace(MeshConfig.parse(mesh), fsdp=1)
    stages = config.stage
    if stages < 2:
        raise ValueError(f"--mesh {mesh!r}: a pipeline needs at least 2 ranks of {STAGE!r}")
    devices = make_mesh(config, jax.devices()[: stages * config.data * config.expert])
    on_gpu = jax.default_backend() == "gpu"
    layer = one_layer(preset("v3"), 8) if on_gpu else one_layer(preset("tiny"), 4)
    return Case(
        model=dataclasses.replace(layer, num_hidden_layers=stages * arguments.layers),
        execution=execution_on(devices, precision, arguments.rematerialise),
        precision=precision,
        microbatches=arguments.microbatches or 4 * stages,
        length=arguments.length or (2048 if on_gpu else 64),
    )


def execution_on(mesh: Mesh, precision: str, rematerialise: str) -> Execution:
    """How to run: with rows for a balanced load, which it is as every token visits every expert."""
    return Execution(
        precision=PRECISIONS[precision],
        rematerialise=rematerialise,
        mesh=mesh,
        capacity_factor=1.0,
    )


def options_of(mesh: Mesh) -> dict[str, Any] | None:
    """The compiler's options: training's, and `OPTIONS`; None for CPUs."""
    options = overlap_options(mesh)
    return None if options is None else options | OPTIONS


def start_all(bench: Bench, case: Case) -> Programs:
    """Lowers the programs of a case one after the other, while those before compile."""
    found: Programs = {}
    for name, f, arguments in programs_of(case, bench.arguments.schedules):
        begin = time.perf_counter()
        try:
            lowered = f.lower(*arguments)
            found[name] = Compiling(lowered, options_of(case.mesh))
        except Exception as error:  # the others go on
            found[name] = error
        say(f"{case}: {name} lowered in {time.perf_counter() - begin:.0f} s")
    return found


def wait_for(bench: Bench, case: Case, programs: Programs) -> dict[str, jax.stages.Compiled]:
    """The programs that could be compiled in time; keeps a row of each that could not."""
    found = {}
    for name, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            found[name] = program.result(bench.arguments.compile_limit)
            memory = found[name].memory_analysis()
            bytes_ = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            shown = " + ".join(f"{number / 1e9:.1f}" for number in bytes_)
            say(f"{case}: {name} compiled in {program.seconds:.0f} s, {shown} GB")
        except Exception as error:
            failed(bench, case, name, error)
    return found


def failed(bench: Bench, case: Case, name: str, error: Exception) -> None:
    """Keeps a row of what could not be timed."""
    first = next(iter(str(error).splitlines()), "")
    bench.keep({"op": name, "case": str(case), "error": f"{type(error).__name__}: {first[:300]}"})


def time_steps(bench: Bench, case: Case, programs: dict, state: Any, times: Any) -> None:
    """Times every schedule that was compiled, checks it against the first, and profiles it."""
    shape = case.abstract_tokens()
    draw = jax.jit(
        lambda key: jax.random.randint(key, shape.shape, 0, case.model.vocab_size, shape.dtype),
        out_shardings=shape.sharding,
    )
    arguments = *state, draw(jax.random.key(2))
    wanted = None
    for name in bench.arguments.schedules:
        if name not in programs:
            continue
        try:
            say(f"{case}: {name}")
            found = np.asarray(jax.block_until_ready(programs[name](*arguments)))
            wanted = found if wanted is None else wanted
            check(found, wanted)
            time_schedule(bench, case, name, programs[name], arguments, times, found)
            profile_schedule(bench, case, name, programs[name], arguments)
        except Exception as error:  # the next one may do
            failed(bench, case, name, error)


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    """Compares two schedules' loss, gradient's norm and choices of experts that were left out.

    Raises:
      ArithmeticError: they are not finite, or differ by more than `TOLERANCE`, or choices were left
        out; prints both.
    """
    if found[2] or not (
        np.isfinite(found).all() and np.allclose(found, wanted, rtol=TOLERANCE, atol=0)
    ):
        raise ArithmeticError(
            f"loss and gradient's norm are {found}, the first schedule's {wanted}"
        )


def time_schedule(
    bench: Bench, case: Case, name: str, step: Any, arguments: tuple, times: Any, found: np.ndarray
) -> None:
    """Times a schedule's step, and keeps a row of it with what is predicted."""
    rounds = []
    for _ in range(bench.arguments.rounds):
        begin = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        rounds.append(time.perf_counter() - begin)
    took = statistics.median(rounds)
    row = {"op": "step", "case": str(case), "implementation": name}
    row |= in_ms(took=took, spread=np.ptp(rounds))
    row |= {"loss": round(float(found[0]), 5), "gradient_norm": float(f"{found[1]:.5g}")}
    tokens = case.microbatches * case.length * case.mesh.size // case.mesh.shape[STAGE]
    row["tokens_per_s"] = round(tokens / took)
    row["temporary_gb"] = round(step.memory_analysis().temp_size_in_bytes / 1e9, 2)
    if times is not None:
        predicted, lockstep, row["ticks"] = expected(case, name, times)
        row |= in_ms(predicted=predicted, lockstep=lockstep)
        row["measured_over_predicted"] = round(took / predicted, 3)
    bench.keep(row)


def expected(case: Case, name: str, times: StageTimes) -> tuple[float, float, int]:
    """Seconds of a schedule's step by `predict`, and of its ticks in lockstep, and these ticks."""
    numbers = {"num_ranks": case.mesh.shape[STAGE], "num_microbatches": case.microbatches}
    seconds = predict(times, **numbers, chunks_per_rank=CHUNKS).seconds[name]
    schedule = Named(schedule=name, microbatches=case.microbatches).steps(case.mesh)
    parts = schedule.num_stages // case.mesh.shape[STAGE]
    table = tabulate(schedule)
    return seconds, lockstep_s(table, times.divide(parts)), table.num_ticks


def profile_schedule(bench: Bench, case: Case, name: str, step: Any, arguments: tuple) -> None:
    """Profiles a step, and keeps a row of what hides of its transfers on the first GPU."""
    label = f"{case}-{name}".replace(" ", "-").replace(",", "-").replace("=", "")
    folder = bench.arguments.profile_dir / label
    path = profile(lambda: jax.block_until_ready(step(*arguments)), folder)
    say(f"{case}: {name}: profile in {path}")
    planes = gpu_planes(path)
    if not planes:
        say(f"{case}: {name}: there is no plane of a GPU in it")
        return
    first = min(planes)
    row = {"op": "hidden", "case": str(case), "implementation": name, "plane": first}
    bench.keep(row | hidden(kernels_of(planes[first])))


def say(text: str) -> None:
    """Prints what goes on, at once."""
    print(f"# {time.strftime('%H:%M:%S')} {text}", flush=True)


def run_case(bench: Bench, case: Case, programs: Programs) -> None:
    """Times all of a case that was compiled."""
    compiled = wait_for(bench, case, programs)
    times = None
    try:
        if missing := {"transfer", "leaves", *PARTS} - set(compiled):
            raise ValueError(f"no prediction without {', '.join(sorted(missing))}")
        times = time_passes(bench, case, compiled)
    except Exception as error:  # steps can be timed without
        failed(bench, case, "passes", error)
    if "state" in compiled:
        state = compiled["state"](jax.device_put(jnp.int32(0), case.everywhere))
        time_steps(bench, case, compiled, state, times)


def read_arguments(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = report.parser("schedules", __doc__)
    meshes = default_meshes(jax.device_count())
    parser.add_argument("--mesh", nargs="+", default=meshes, help="for example stage=2,expert=2")
    parser.add_argument("--precision", nargs="+", default=["fp8"], choices=("bf16", "fp8"))
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=KNOWN)
    parser.add_argument("--layers", type=at_least_one, default=2, help="of a rank of the pipeline")
    parser.add_argument("--microbatches", type=at_least_one, help="of a step; 4 for each stage")
    parser.add_argument("--length", type=at_least_one, help="tokens of a microbatch on a device")
    parser.add_argument("--rematerialise", default="none", choices=tuple(REMATERIALISATION))
    parser.add_argument("--compile-limit", type=float, default=240, help="seconds of a program")
    parser.add_argument("--profile-dir", type=Path, help="where profiles are kept")
    arguments = parser.parse_args(args)
    arguments.profile_dir = arguments.profile_dir or Path(tempfile.mkdtemp())
    if arguments.layers % CHUNKS:
        raise ValueError(
            f"--layers {arguments.layers} must be a multiple of {CHUNKS}, the chunks of a rank"
        )
    return arguments


def main(args: Sequence[str] | None = None) -> bool:
    """Times every schedule on every mesh; gives whether a program still compiles."""
    args = sys.argv[1:] if args is None else args
    bench = Bench("schedules", read_arguments(args), args)
    bench.context["timer"] = "wall clock"
    chosen = bench.arguments
    cases = [make_case(chosen, mesh, p) for p in chosen.precision for mesh in chosen.mesh]
    started = [(case, start_all(bench, case)) for case in cases]
    for case, programs in started:
        run_case(bench, case, programs)
    table(bench.rows)
    return any(
        isinstance(program, Compiling) and program.unfinished
        for _, programs in started
        for program in programs.values()
    )


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the steps, and what of their all-to-alls hides."""
    hides = {(r["case"], r["implementation"]): r for r in rows if r["op"] == "hidden"}
    for row in rows:
        if row["op"] == "step":
            shown = [f"{row.get(f'{n}_ms', 0):>10.1f}" for n in ("took", "predicted", "lockstep")]
            of_it = hides.get((row["case"], row["implementation"]), {}).get("all-to-all_hidden")
            hiding = "" if of_it is None else f"{100 * of_it:>5.0f} % of all-to-alls hidden"
            print(f"{row['case']:<38}{row['implementation']:<22}{''.join(shown)} ms{hiding}")
