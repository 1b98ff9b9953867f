"""Progress of long work: a live line on a terminal, plain lines in a log."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG_EVERY_S = 5.0  # between two lines where there is no terminal

_started = time.perf_counter()


def stage(title: str) -> None:
    """Prints what begins now, and the seconds since the program began."""
    from rich.console import Console

    elapsed = f"({time.perf_counter() - _started:.0f} s)"
    console = Console(highlight=False, markup=False)  # a path in the title may hold brackets
    console.print(f"== {title}  {elapsed}", style="bold", soft_wrap=True)


class Bar:
    """The progress of one task; `advance` is its one verb."""

    def __init__(self, show: Any, description: str, total: int, completed: int):
        self._show, self._description, self._total = show, description, total
        self._done, self._shown = completed, -math.inf
        self.advance(0)  # the first step may compile for long: say what is waited for

    def advance(self, amount: int = 1, **fields: float) -> None:
        """Counts `amount` more steps; the fields are printed beside them."""
        self._done += amount
        text = "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
        now = time.perf_counter()
        last = self._done >= self._total
        if now - self._shown >= self._show.interval or last:
            self._shown = now
            self._show(self._description, self._done, self._total, text)


@contextmanager
def progress(
    description: str, *, total: int, completed: int = 0, shown: bool = True
) -> Iterator[Bar]:
    """Shows the progress of `total` steps of which `completed` are done already, if `shown`."""
    from rich.console import Console

    if not shown:
        yield Bar(_nothing, description, total, completed)
        return
    console = Console()
    with _live(console) if console.is_terminal else _plain(console) as show:
        yield Bar(show, description, total, completed)


@contextmanager
def _live(console: Any) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=None, text="")

        def show(description: str, done: int, total: int, text: str) -> None:
            bars.update(task, description=description, completed=done, total=total, text=text)

        show.interval = 0.1
        yield show


def _nothing(description: str, done: int, total: int, text: str) -> None:
    pass


_nothing.interval = math.inf


@contextmanager
def _plain(console: Any) -> Iterator[Any]:
    def show(description: str, done: int, total: int, text: str) -> None:
        print(f"{description} {done}/{total}  {text}".rstrip(), flush=True)

    show.interval = LOG_EVERY_S
    yield show
