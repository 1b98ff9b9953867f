"""Many calls at once."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class Ending:
    """A thread that begins at once, and whose end can be waited for again.

    Until Python 3.13 a thread counts as ended once a Ctrl-C has interrupted its `join`.

    Args:
      call: what it does; it raises nothing.
      name: of the thread.
    """

    def __init__(self, call: Callable[[], None], name: str | None = None):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(call,), name=name)
        self._thread.start()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Waits for its end."""
        self._ended.wait()


def run_all(
    calls: Sequence[Callable[[], Result]], num_threads: int, done: Callable[[Result], None]
) -> None:
    """Makes calls in threads; once one has failed no other is begun.

    Not by a ThreadPoolExecutor: those take no more calls once the main thread has ended, and what a
    script saved in its last line shall be written before the interpreter goes. (Python 3.12.0 and
    3.12.1 start no threads then either: there the save ends with an error.)

    Args:
      calls: in the order in which they begin.
      num_threads: calls at once.
      done: called with each result, by one thread at a time.

    Raises:
      BaseException: what the first call that failed raised.
    """
    waiting, taking, telling = iter(calls), threading.Lock(), threading.Lock()
    errors: list[BaseException] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with taking:
                call = next(waiting, None)
            if call is None:
                return
            try:
                result = call()
                with telling:
                    done(result)
            except BaseException as error:
                errors.append(error)
                over.set()

    threads = [Ending(work) for _ in range(min(num_threads, len(calls)))]
    try:
        for thread in threads:
            thread.wait()
    finally:
        over.set()  # also when the wait was interrupted
        for thread in threads:
            thread.wait()
    if errors:
        raise errors[0]
