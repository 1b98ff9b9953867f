"""Compiles programs side by side in threads, and stops waiting for one that takes too long."""

import threading
import time
from typing import Any

import jax


class Compiling:
    """A program that is being compiled; the thread is a daemon, so it holds up no exit.

    Attributes:
      seconds: that it took; None until it is done.
    """

    def __init__(self, lowered: jax.stages.Lowered, options: dict[str, Any] | None):
        self.seconds: float | None = None
        self._begin = time.perf_counter()
        self._found: Any = None
        self._thread = threading.Thread(target=self._run, args=(lowered, options), daemon=True)
        self._thread.start()

    def _run(self, lowered, options):
        try:
            self._found = lowered.compile(compiler_options=options)
        except Exception as error:  # whatever XLA says is told to who asks for the program
            self._found = error
        self.seconds = time.perf_counter() - self._begin

    @property
    def unfinished(self) -> bool:
        """Whether it still compiles."""
        return self._thread.is_alive()

    def result(self, limit_s: float) -> jax.stages.Compiled:
        """The compiled program, after waiting until `limit_s` seconds from its start have passed.

        Raises:
          TimeoutError: it is not done by then.
          Exception: what the compiler raised.
        """
        self._thread.join(max(self._begin + limit_s - time.perf_counter(), 0))
        if self.unfinished:
            raise TimeoutError(f"compiling has not ended after {limit_s:g} seconds")
        if isinstance(self._found, Exception):
            raise self._found
        return self._found
