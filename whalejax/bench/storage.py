"""Times saving and restoring beside raw files, TensorStore and Orbax, on a tmpfs and on a disk.

`python -m whalejax.bench.storage` writes 2 GiB of random float32 in 64 arrays and reads them again.
Implementations take turns; every row is the median of its rounds, and counts the bytes that a
restore got wrong. Raw files are one `write` or `read` an array in four threads, synchronised, which
is what a disk can do at best without checksums; reading is from the page cache for all.
"""

import dataclasses
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import jax
import numpy as np

from whalejax import storage
from whalejax.bench import report
from whalejax.bench.report import Bench
from whalejax.checkpoint import CheckpointStore
from whalejax.storage.memory import host_array

THREADS = 4  # of raw files
PLACES = {"tmpfs": Path("/dev/shm"), "disk": Path()}
PAUSE_S = 1.0  # in which disk and memory get over what was deleted before
FRESH = "fresh"  # restored into memory of the restored arrays' own
POOLED = "pooled"  # into memory that was used before
Tree = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
      op: what it does: `write`, `read pooled`, `read fresh`, ...
      name: who does it.
      run: does it; what it returns is compared with what was written, if it is a tree.
      prepare: is not timed.
      finish: is not timed either.
    """

    op: str
    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


def draw(arrays: int, nbytes: int) -> Tree:
    """Random float32 arrays of `nbytes` together."""
    rows = nbytes // arrays // 4 // 1024
    generator = np.random.default_rng(0)
    return {
        f"layer_{i:03d}": jax.device_put(generator.standard_normal((rows, 1024), np.float32))
        for i in range(arrays)
    }


def pooled(tree: Tree) -> dict[str, np.ndarray]:
    """Host memory for a tree, used before."""
    room = {name: host_array(leaf.shape, leaf.dtype) for name, leaf in tree.items()}
    for memory in room.values():
        memory.fill(1)
    return room


def raw(folder: Path, tree: Tree, room: dict[str, np.ndarray]) -> list[Candidate]:
    """Files as they are."""
    views = {name: memoryview(np.asarray(leaf)).cast("B") for name, leaf in tree.items()}
    targets = {name: memoryview(memory).cast("B") for name, memory in room.items()}

    def write(name):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        rest = views[name]
        while len(rest):
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
        os.close(file)

    def read(name):
        with open(folder / name, "rb", buffering=0) as file:
            file.readinto(targets[name])

    def read_checked(name):
        read(name)
        crc32c.crc32c(targets[name])

    def all_of(f):
        def run():
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(f, tree))
            return room if f is not write else None

        return run

    return [
        Candidate("write", "raw", all_of(write), prepare=lambda: remove(folder)),
        Candidate(f"read {POOLED}", "raw", all_of(read)),
        Candidate(f"read {POOLED}", "raw + CRC32C", all_of(read_checked)),
    ]


def ours(folder: Path, tree: Tree, room: dict[str, np.ndarray]) -> list[Candidate]:
    """CheckpointStore: saving while the caller waits, and beside it; restoring with checksums."""
    store = CheckpointStore(folder)
    abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tree.items()}

    def restore(like, **options):
        return lambda: jax.block_until_ready(store.restore(0, like, **options))

    def prepare():
        remove(folder)

    return [
        Candidate("save in the back", "whalejax", lambda: store.save(0, tree), prepare, store.wait),
        Candidate("write", "whalejax", lambda: store.save(0, tree, block=True), prepare),
        Candidate(f"read {POOLED}", "whalejax", restore(room)),
        Candidate(f"read {POOLED}", "whalejax, no checksums", restore(room, verify=False)),
        Candidate(f"read {FRESH}", "whalejax", restore(abstract)),
    ]


def tensorstores(folder: Path, tree: Tree, room: dict[str, np.ndarray]) -> list[Candidate]:
    """TensorStore's zarr3 and file drivers, chunks of 16 MiB."""
    import tensorstore as ts

    def opened(name, leaf, **options):
        rows = min(leaf.shape[0], 2**24 // (leaf.shape[1] * 4))
        spec = {
            "driver": "zarr3",
            "kvstore": f"file://{(folder / name).absolute()}/",
            "metadata": {"chunk_grid": {"name": "regular"}, "data_type": "float32"},
        }
        spec["metadata"]["shape"] = leaf.shape
        spec["metadata"]["chunk_grid"]["configuration"] = {"chunk_shape": [rows, leaf.shape[1]]}
        return ts.open(spec, **options)

    def write():
        stores = [(opened(n, x, create=True), x) for n, x in tree.items()]
        writes = [
            store.result().write(np.asarray(x), can_reference_source_data_indefinitely=True)
            for store, x in stores
        ]
        for one in writes:
            one.result()

    def read():
        stores = [(opened(n, x, open=True), room[n]) for n, x in tree.items()]
        copies = [ts.array(memory).write(store.result()) for store, memory in stores]
        for one in copies:
            one.result()
        return room

    return [
        Candidate("write", "TensorStore", write, prepare=lambda: remove(folder)),
        Candidate(f"read {POOLED}", "TensorStore", read),
    ]


def orbax(folder: Path, tree: Tree, name: str, **options: Any) -> list[Candidate]:
    """Orbax's Checkpointer of pytrees."""
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))
    path = folder.absolute() / "0"

    def write():
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    def read():
        args = ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
        )
        return jax.block_until_ready(checkpointer.restore(path, args=args))

    return [
        Candidate("write", name, write, prepare=lambda: remove(folder)),
        Candidate(f"read {FRESH}", name, read),
    ]


def copies(tree: Tree, room: dict[str, np.ndarray]) -> list[Candidate]:
    """What memory and the CPU can do at best."""
    views = {name: np.asarray(leaf) for name, leaf in tree.items()}

    def copy():
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda name: np.copyto(room[name], views[name]), tree))

    def checksums():
        for view in views.values():
            storage.digest(memoryview(view))

    return [
        Candidate("copy", "memcpy, 4 threads", copy),
        Candidate("checksums", "CRC32C and XXH3, 1 thread", checksums),
    ]


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def wrong_bytes(tree: Tree, found: Any) -> int | None:
    """Bytes that differ from what was written; None if nothing was read."""
    if found is None:
        return None
    views = ((np.asarray(leaf), np.asarray(found[name])) for name, leaf in tree.items())
    return sum(int((a.view(np.uint8) != b.view(np.uint8)).sum()) for a, b in views)


def measure(
    bench: Bench, case: str, tree: Tree, groups: dict[Path | None, list[Candidate]]
) -> None:
    """Times candidates in turn and keeps a row of each; the first round warms up.

    Those of a group share a folder, which is deleted after their turn: memory holds one of them.
    """
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    wrong: dict[tuple[str, str], int | None] = {}
    nbytes = sum(leaf.nbytes for leaf in tree.values())
    for turn in range(bench.arguments.rounds + 1):
        for folder, candidates in groups.items():
            for candidate in candidates:
                key = (candidate.op, candidate.name)
                *found, result = time_once(candidate)
                if turn:
                    times.setdefault(key, []).append(found)
                else:
                    wrong[key] = wrong_bytes(tree, result)
                del result
            if folder is not None:
                remove(folder)
    for (op, name), pairs in times.items():
        walls, cpus = zip(*pairs, strict=True)
        wall = statistics.median(walls)
        bench.keep(
            {
                "op": op,
                "case": case,
                "implementation": name,
                "seconds": round(wall, 4),
                "spread_s": round(max(walls) - min(walls), 4),
                "gbs": round(nbytes / wall / 1e9, 2),
                "cpu_s_per_gib": round(statistics.median(cpus) / nbytes * 2**30, 3),
                "wrong_bytes": wrong[op, name],
            }
        )


def time_once(candidate: Candidate) -> tuple[float, float, Any]:
    """Seconds of one run, those of all CPUs, and what it returned."""
    candidate.prepare()
    os.sync()
    time.sleep(PAUSE_S)
    if candidate.op.startswith("read"):
        candidate.run()  # what was just written is slower to read for the first time
    cpu, begin = time.process_time(), time.perf_counter()
    result = candidate.run()
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    candidate.finish()
    return wall, cpu, result


def table(rows: list[dict[str, Any]]) -> None:
    """Prints what was found, and the ratios that whalejax promises."""
    for row in rows:
        print(
            f"{row['case']:<7}{row['op']:<18}{row['implementation']:<28}{row['seconds']:>8.3f} s"
            f"{row['gbs']:>8.2f} GB/s{row['cpu_s_per_gib']:>7.2f} CPU s/GiB"
        )
    seconds = {(r["case"], r["op"], r["implementation"]): r["seconds"] for r in rows}

    def ratio(case, slower, faster):
        return seconds[case, *slower] / seconds[case, *faster]

    write, fresh = ("write", "whalejax"), (f"read {FRESH}", "whalejax")
    back, read = ("save in the back", "whalejax"), f"read {POOLED}"
    for case in dict.fromkeys(row["case"] for row in rows):
        if (case, *write) not in seconds:
            continue
        print(
            f"{case}: write {ratio(case, ('write', 'raw'), write):.2f} x raw, "
            f"{ratio(case, ('write', 'Orbax'), write):.1f} x Orbax; verified restore "
            f"{ratio(case, (read, 'raw + CRC32C'), (read, 'whalejax')):.2f} x raw + CRC32C, fresh "
            f"{ratio(case, (f'read {FRESH}', 'Orbax uncompressed'), fresh):.2f} x Orbax "
            f"uncompressed; saving in the back stops for {ratio(case, back, write):.1%} of a save"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Times everything on a tmpfs and a disk."""
    args = sys.argv[1:] if args is None else args
    parser = report.parser("storage", __doc__)
    parser.add_argument("--mib", type=report.at_least_one, default=2048, help="MiB in all")
    parser.add_argument("--arrays", type=report.at_least_one, default=64)
    for name, path in PLACES.items():
        parser.add_argument(f"--{name}", type=Path, default=path, help=f"a folder on a {name}")
    bench = Bench("storage", parser.parse_args(args), args)
    tree = draw(bench.arguments.arrays, bench.arguments.mib * 2**20)
    room = pooled(tree)
    measure(bench, "memory", tree, {None: copies(tree, room)})
    plain = {"use_ocdbt": False, "use_zarr3": True, "use_compression": False}
    for case in PLACES:
        folder = getattr(bench.arguments, case) / f".whalejax-bench-{os.getpid()}"
        folders = [folder / name for name in ("raw", "whalejax", "tensorstore", "orbax", "plain")]
        groups = {
            folders[0]: raw(folders[0], tree, room),
            folders[1]: ours(folders[1], tree, room),
            folders[2]: tensorstores(folders[2], tree, room),
            folders[3]: orbax(folders[3], tree, "Orbax"),
            folders[4]: orbax(folders[4], tree, "Orbax uncompressed", **plain),
        }
        try:
            measure(bench, case, tree, groups)
        finally:
            remove(folder)
    table(bench.rows)


if __name__ == "__main__":
    main()
