"""How much of a program's transfers between GPUs hides behind its computation, from a profile.

`python -m whalejax.bench.schedules.hiding FILE.xplane.pb` prints it for every GPU of a saved one.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

COLLECTIVES = (
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
)
JAX_NAMES = {"ppermute": "collective-permute", "psum": "all-reduce", "pmax": "all-reduce"}
COMPUTE, COPY = "compute", "copy"
Intervals = Sequence[tuple[float, float]]  # of starts and ends


class Kernel(NamedTuple):
    """What ran on a stream of a GPU: its kind, `COMPUTE`, `COPY` or a collective's; in ns."""

    kind: str
    start: float
    end: float


def merged(intervals: Intervals) -> list[tuple[float, float]]:
    """The same times as disjoint intervals, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(intervals: Intervals) -> float:
    """The time in which at least one of them lasts."""
    return sum(end - start for start, end in merged(intervals))


def shared(first: Intervals, second: Intervals) -> float:
    """The time in which one of the first and one of the second lasts."""
    return length(first) + length(second) - length([*first, *second])


def kind_of(name: str, stats: dict[str, Any]) -> str:
    """What a kernel belongs to, from its name and from the XLA operation that launched it.

    XLA calls an operation either as it calls all of its kind, or after the function of JAX's.
    """
    operation = str(stats.get("hlo_op", "")).split("/")[-1]  # the innermost of nested ones
    base, *number = operation.split(".")
    operation = ".".join((JAX_NAMES.get(base, base.replace("_", "-")), *number))
    name = name.lower()
    for collective in COLLECTIVES:
        if operation.startswith(collective):
            return collective
    if "nccl" in name:
        return "send-recv" if "sendrecv" in name else "collective"
    return COPY if name.startswith(("memcpy", "memset")) else COMPUTE


def kernels_of(plane: Any) -> list[Kernel]:
    """All that ran on the streams of a GPU, of a plane of a profile."""
    return [
        Kernel(kind_of(e.name, dict(e.stats)), e.start_ns, e.start_ns + e.duration_ns)
        for line in plane.lines
        if line.name.startswith("Stream")  # others tell the same again, by operation or module
        for e in line.events
    ]


def hidden(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds of computation and of each kind of collective, and which fraction of it hides.

    A collective hides while a kernel that computes runs on the same GPU. Its time counts from the
    start of its kernel, waiting for other ranks included.
    """
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for kernel in kernels:
        by_kind.setdefault(kernel.kind, []).append((kernel.start, kernel.end))
    everything = [interval for intervals in by_kind.values() for interval in intervals]
    compute = by_kind.pop(COMPUTE, [])
    by_kind.pop(COPY, None)
    span = max(e for _, e in everything) - min(s for s, _ in everything) if everything else 0
    found = {"span_ms": span * 1e-6, "compute_ms": length(compute) * 1e-6}
    for kind, intervals in sorted(by_kind.items()):
        total = length(intervals)
        found[f"{kind}_ms"] = total * 1e-6
        found[f"{kind}_hidden"] = shared(intervals, compute) / total if total else 0.0
    return {name: round(value, 4) for name, value in found.items()}


def gpu_planes(path: Path) -> dict[str, Any]:
    """The planes of a profile that are GPUs, by name; none of a profile of CPUs."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return {plane.name: plane for plane in planes if plane.name.startswith("/device:GPU")}


def profile(call: Any, folder: Path) -> Path:
    """Calls a function that waits for its result, and profiles it.

    Returns:
      The new file below `folder`.
    """
    before = set(folder.rglob("*.xplane.pb"))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would fill the buffers
    options.enable_hlo_proto = False  # of all programs that the process has
    with jax.profiler.trace(str(folder), profiler_options=options):
        call()
    return max(set(folder.rglob("*.xplane.pb")) - before)


def main() -> None:
    """Prints a line of JSON for every GPU of a profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    planes = gpu_planes(parser.parse_args().path)
    for name, plane in planes.items():
        print(json.dumps({"plane": name} | hidden(kernels_of(plane))), flush=True)
    if not planes:
        print("there is no plane of a GPU")


if __name__ == "__main__":
    main()
