"""The command line: `whalejax demo | train | generate | checkpoint | bench | info`."""

import contextlib
import dataclasses
import importlib
import io
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
DEBUG = "--debug"
# the caller's mistakes, and what a machine or a run cannot do: one line, no traceback
EXPECTED = (ValueError, OSError, NotImplementedError, FloatingPointError)


def demo_command(args: Sequence[str]) -> None:
    """Train a tiny model on the Python standard library, and let it write."""
    from whalejax.demo import DemoConfig, demo

    demo(parse(DemoConfig, "demo", args))


def train_command(args: Sequence[str]) -> None:
    """Train a model, or go on with a run."""
    import jax

    from whalejax.parallel.mesh import MeshConfig
    from whalejax.parallel.runtime import JobConfig, join
    from whalejax.training.pipeline import PipelineConfig
    from whalejax.training.run import TrainConfig, train

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Train(TrainConfig):
        from_pretrained: Annotated[Path | None, tyro.conf.arg(name="from")] = None
        mesh: str = str(MeshConfig())
        pipeline: Annotated[PipelineConfig, tyro.conf.arg(name="")] = PipelineConfig()
        job: Annotated[JobConfig, tyro.conf.arg(name="")] = JobConfig()

    Train.__doc__ = TrainConfig.__doc__
    config = vars(parse(Train, "train", args))
    join(config.pop("job"))
    if config["precision"] == "f64":  # before the first array: it changes what arrays there are
        jax.config.update("jax_enable_x64", True)
    train(TrainConfig(**config | {"mesh": MeshConfig.parse(config["mesh"])}))


def generate_command(args: Sequence[str]) -> None:
    """Write text after a prompt, or answer in a chat."""
    from whalejax.generation.run import GenerateConfig, generate

    generate(parse(GenerateConfig, "generate", args))


def checkpoint_command(args: Sequence[str]) -> None:
    """Look after checkpoints, by name: ls, inspect, verify, diff, rm."""
    from whalejax.checkpoint.commands import run

    if code := run(args):
        sys.exit(code)


def bench_command(args: Sequence[str]) -> None:
    """Time parts beside their peers, by name: gemm, mla, attention, expert, storage and others."""
    from whalejax import bench

    names = sorted(module.name for module in pkgutil.iter_modules(bench.__path__))
    names = [name for name in names if name not in bench.SHARED]
    if not args or args[0] not in names:
        given = repr(args[0]) if args else "no name"
        raise ValueError(f"{given} is no benchmark; there are {', '.join(names)}")
    importlib.import_module(f"whalejax.bench.{args[0]}").main(args[1:])


def info_command(args: Sequence[str]) -> None:
    """Show versions, devices, storage, and which kernel backends can run here."""
    from whalejax.info import info

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Info:
        __doc__ = info_command.__doc__
        path: str = "."  # whose storage to describe: a path or a URL

    info(parse(Info, "info", args).path)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo_command,
    "train": train_command,
    "generate": generate_command,
    "checkpoint": checkpoint_command,
    "bench": bench_command,
    "info": info_command,
}


def run(args: Sequence[str]) -> int:
    """Runs a command line and returns its exit code.

    The caller's mistakes give one line on standard error and code 2; `--debug`, anywhere, gives the
    traceback too.
    """
    debug = DEBUG in args
    args = [arg for arg in args if arg != DEBUG]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else USAGE_ERROR
    try:
        if args[0] not in COMMANDS:
            raise ValueError(f"{args[0]!r} is no command; there are {', '.join(COMMANDS)}")
        COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt:
        print("whalejax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        if debug:
            traceback.print_exc()
        print(f"whalejax: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def parse(config: type, command: str, args: Sequence[str]) -> Any:
    """A config dataclass from flags; exits after printing `--help`.

    Raises:
      ValueError: a flag is unknown or its value does not fit; in one line.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config, prog=f"whalejax {command}", args=list(args))
    except SystemExit as error:
        if not error.code:
            raise
        message = unboxed(errors.getvalue()) or "the flags cannot be read"
        raise ValueError(f"{message} (see whalejax {command} --help)") from None


def unboxed(text: str) -> str:
    """The message of an error that tyro framed: what stands between its title and the next rule.

    Where standard output is not UTF-8, tyro rules with hyphens, also below the title.
    """
    lines = [line.strip().strip("│").strip() for line in text.splitlines()]
    message = []
    for line in lines[1:]:
        if line and not line.strip("─-╰╯"):
            if message:
                break
        elif line:
            message.append(line)
    return " ".join(message)


def one_line(error: BaseException) -> str:
    """An error's message in one line; an OSError's with its path."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:12}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: whalejax COMMAND [flags]   (--help for a command's flags)",
            "",
            *lines,
            "",
            f"  {DEBUG} anywhere prints the traceback of an error",
        ]
    )
