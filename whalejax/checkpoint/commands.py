"""`whalejax checkpoint ls | inspect | verify | diff | rm`."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from whalejax.checkpoint.manifest import Manifest
from whalejax.checkpoint.store import RUN_FOLDER, CheckpointStore
from whalejax.checkpoint.verifying import find_manifest
from whalejax.cli import parse
from whalejax.progress import progress

FAULTS = 1  # exit code of `verify` while there is damage
UNLIMITED = 1000  # columns of a table that goes into a file or another program
ROUNDED_UP = 999.5  # from here on three digits are not enough
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

PathOrURL = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
Step = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
Newest = Annotated[int | None, tyro.conf.Positional, tyro.conf.arg(metavar="[STEP]")]
Steps = Annotated[tuple[int, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[STEP ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """List the checkpoints of a run, and what killed saves left.

    Args:
      path: of the checkpoints, or of the run; a folder or a URL.
    """

    path: PathOrURL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a checkpoint consists of.

    Args:
      path: of the checkpoints, or of the run; a folder or a URL.
      step: which; the newest without it.
      json: print JSON.
    """

    path: PathOrURL
    step: Newest = None
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read all of a checkpoint: exit code 1 if anything is not as it was written.

    Args:
      path: of the checkpoints, or of the run; a folder or a URL.
      steps: which; all without any.
      repair: mend single flipped bits that both checksums prove, and keep the broken files.
    """

    path: PathOrURL
    steps: Steps = ()
    repair: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Show what differs between the checkpoints of two steps.

    Args:
      path: of the checkpoints, or of the run; a folder or a URL.
      a: the first step.
      b: the second step.
    """

    path: PathOrURL
    a: Step
    b: Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remove:
    """Delete checkpoints.

    Args:
      path: of the checkpoints, or of the run; a folder or a URL.
      steps: which.
      unfinished: delete what killed saves and deletions left; not while a job is saving there.
      force: delete even the newest checkpoint.
    """

    path: PathOrURL
    steps: Steps = ()
    unfinished: bool = False
    force: bool = False


def list_checkpoints(config: List) -> int:
    """Prints a table of checkpoints, and the folders of killed saves."""
    store = find_store(config.path)
    rows = []
    for step in store.steps():
        manifest, fault = _look_into(store, step)
        row = ("?", "?", "?") if manifest is None else _summary(manifest)
        rows.append((str(step), *row, fault))
    for folder in store.unfinished():
        files = len(store.place.names(folder))
        rows.append((folder, "", "", "", f"unfinished, {files} files"))
    print_table(("step", "created", "size", "arrays", ""), rows)
    return 0


def inspect_checkpoint(config: Inspect) -> int:
    """Prints a checkpoint's arrays, values and metadata."""
    store = find_store(config.path)
    step = store.steps()[-1:] if config.step is None else [config.step]
    if not step:
        raise FileNotFoundError(f"{store.place.url} holds no complete checkpoint")
    manifest = store.manifest(step[0])
    if config.json:
        print(json.dumps(_as_json(manifest), indent=1))
        return 0
    created, size, _ = _summary(manifest)
    print(f"step {manifest.step}, created {created}, {size}")
    rows = [
        (name, a.layout.dtype.name, list(a.layout.shape), len(a.digests), in_units(a.nbytes))
        for name, a in sorted(manifest.arrays.items())
    ]
    print_table(("array", "dtype", "shape", "extents", "size"), rows)
    for name, value in (manifest.values | manifest.quantized).items():
        print(f"{name}: {value!r}")
    if manifest.metadata is not None:
        print(f"metadata: {json.dumps(manifest.metadata)}")
    return 0


def verify_checkpoints(config: Verify) -> int:
    """Verifies checkpoints one after the other; 1 if any is damaged when it is done."""
    store = find_store(config.path)
    steps = _known(store, config.steps) or store.steps()
    damaged = 0
    for step in steps:
        manifest, _ = find_manifest(store.place, str(step))
        arrays = [] if manifest is None else manifest.arrays.values()
        files = sum(1 + len(array.digests) for array in arrays)
        with progress(f"verifying step {step}, files", total=files) as bar:
            report = store.verify(
                step, repair=config.repair, progressed=lambda _, bar=bar: bar.advance()
            )
        for fault in report.faults:
            print(f"step {step}: {fault}{' -- mended' if fault in report.mended else ''}")
        damaged += len(report.damaged)
        found = f"{len(report.faults)} faults, {len(report.mended)} of them mended"
        print(f"step {step}: {in_units(report.nbytes)}, {found if report.faults else 'as written'}")
    return FAULTS if damaged else 0


def diff_checkpoints(config: Diff) -> int:
    """Prints what differs, a line each."""
    store = find_store(config.path)
    print(store.diff(config.a, config.b))
    return 0


def remove_checkpoints(config: Remove) -> int:
    """Deletes checkpoints, and says what that frees."""
    store = find_store(config.path)
    steps = _known(store, config.steps)
    if not steps and not config.unfinished:
        raise ValueError(f"name steps of {store.place.url} to delete, or say --unfinished")
    newest = store.steps()[-1:]
    if not config.force and set(newest) & set(steps):
        raise ValueError(
            f"step {newest[0]} is the newest of {store.place.url}: say --force to delete it"
        )
    for step in steps:
        manifest, fault = _look_into(store, step)
        store.remove(step)
        freed = f"unknown ({fault})" if manifest is None else in_units(manifest.nbytes)
        print(f"deleted step {step}, freed: {freed}")
    if config.unfinished:
        for folder in store.unfinished():
            files = len(store.place.names(folder))
            store.place.remove_tree(folder)
            print(f"deleted {folder}, files: {files}")
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "ls": (List, list_checkpoints),
    "inspect": (Inspect, inspect_checkpoint),
    "verify": (Verify, verify_checkpoints),
    "diff": (Diff, diff_checkpoints),
    "rm": (Remove, remove_checkpoints),
}


def run(args: Sequence[str]) -> int:
    """Runs one of them and returns its exit code.

    Raises:
      ValueError: it is unknown, or its arguments are wrong: nothing was changed.
      OSError: there is no such checkpoint, or the place failed.
    """
    if args and args[0] in ("-h", "--help", "help"):
        for name, (config, _) in COMMANDS.items():
            print(f"  whalejax checkpoint {name:8} {config.__doc__.splitlines()[0]}")
        return 0
    if not args or args[0] not in COMMANDS:
        given = f"{args[0]!r} is no command for checkpoints" if args else "no command was given"
        raise ValueError(f"{given}; there are {', '.join(COMMANDS)}")
    config, command = COMMANDS[args[0]]
    return command(parse(config, f"checkpoint {args[0]}", args[1:]))


def find_store(path: str) -> CheckpointStore:
    """The checkpoints at a path, or below the folder of a run.

    Raises:
      FileNotFoundError: there are none, and no save that was killed either.
    """
    base, mark, options = path.partition("?") if "://" in path else (path, "", "")
    for url in (path, f"{base.rstrip('/')}/{RUN_FOLDER}{mark}{options}"):
        store = CheckpointStore(url)
        if store.steps() or store.unfinished():
            return store
    raise FileNotFoundError(f"{path} holds no checkpoints, nor does {RUN_FOLDER} below it")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table as wide as it needs to be where no terminal limits it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # a name may hold brackets
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    console.print(table)


def _known(store: CheckpointStore, steps: Sequence[int]) -> list[int]:
    """The steps, each once.

    Raises:
      FileNotFoundError: some have no checkpoint; names all of them.
    """
    there = store.steps()
    if missing := [step for step in steps if step not in there]:
        raise FileNotFoundError(
            f"{store.place.url} has no checkpoint of step {', '.join(map(str, missing))}; "
            f"its steps: {', '.join(map(str, there)) or 'none'}"
        )
    return list(dict.fromkeys(steps))


def _look_into(store: CheckpointStore, step: int) -> tuple[Manifest | None, str]:
    """A manifest, if it can be read, and what is wrong with it."""
    try:
        manifest, finding = find_manifest(store.place, str(step))
    except ValueError as error:  # of a later version
        return None, str(error)
    return manifest, "" if finding is None else str(finding.fault)


def _summary(manifest: Manifest) -> tuple[str, str, str]:
    return manifest.created, in_units(manifest.nbytes), str(len(manifest.arrays))


def _as_json(manifest: Manifest) -> dict[str, Any]:
    arrays = [
        {
            "name": name,
            "shape": array.layout.shape,
            "dtype": array.layout.dtype.name,
            "key": array.layout.key,
            "chunk": array.layout.chunk,
            "extents": len(array.digests),
            "bytes": array.nbytes,
        }
        for name, array in sorted(manifest.arrays.items())
    ]
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    return fields | {"arrays": arrays, "bytes": manifest.nbytes}


def in_units(nbytes: int) -> str:
    """Bytes with a unit, to three digits."""
    power = 0
    while nbytes / 1024**power >= ROUNDED_UP and power < len(UNITS) - 1:
        power += 1
    return f"{nbytes / 1024**power:.3g} {UNITS[power]}"
