"""Saving in several processes: each tells the others that it lives and what became of its part.

They talk through the key-value store of `jax.distributed`, not through collectives, which must not
run beside those of a training step, and not through files, which a cluster's clients see late (3FS
keeps attributes for 30 s). Nobody waits for one that gave no sign of life for `timeout_s`.
"""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import jax

from whalejax.parallel.runtime import first_line, key_value_store

TIMEOUT_S = 30.0  # without a sign of life; below the minute after which JAX ends the whole job
BEATS = 10  # signs of life in that time
ALIVE = "alive"  # the key of signs of life; a process's number stands below it, as below a stage
FINE = "fine"

_meetings = itertools.count()  # every process counts alike, so that each meeting has a name


class MissingProcessError(OSError):
    """A process of the job ended, or gave no sign of life, before its part was done."""


class Meeting:
    """One thing that all processes of a job do together, such as a save.

    Made in the same order by all. Without `jax.distributed` there is only this process.

    Args:
      title: what they do, for errors.
      timeout_s: without a sign of life, after which a process counts as missing.
    """

    def __init__(self, title: str, timeout_s: float = TIMEOUT_S):
        self.title, self.timeout_s = title, timeout_s
        self.process, self.num_processes = jax.process_index(), jax.process_count()
        self._prefix = f"whalejax/meeting/{next(_meetings)}"
        self._client = key_value_store() if self.num_processes > 1 else None

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Gives signs of life from a thread of its own, until the block ends."""
        if self._client is None:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            with suppress(MissingProcessError):  # who waits for others learns of it too
                for count in itertools.count():
                    self._set(ALIVE, str(count))
                    if over.wait(self.timeout_s / BEATS):
                        return

        thread = threading.Thread(target=beat, name=f"alive: {self.title}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def report(self, stage: str, error: BaseException | None = None) -> None:
        """Tells the others that this process is done with a stage, or why it never will be."""
        if self._client is not None:
            self._set(stage, FINE if error is None else f"{type(error).__name__}: {error}")

    def wait_for(self, stage: str, processes: Iterable[int]) -> None:
        """Waits until each of these processes has reported a stage.

        Raises:
          MissingProcessError: one gave no sign of life for `timeout_s`; names all such.
          OSError: one reported that it failed; with what it said.
        """
        if self._client is None:
            return
        waiting = set(processes) - {self.process}
        seen: dict[int, tuple[str, float]] = dict.fromkeys(waiting, ("", time.monotonic()))
        while True:
            reports, signs = self._all(stage), self._all(ALIVE)
            failed = {p: r for p, r in sorted(reports.items()) if p in waiting and r != FINE}
            if failed:
                told = "; ".join(f"process {p}: {report}" for p, report in failed.items())
                raise OSError(f"{self.title} failed: {told}")
            waiting -= set(reports)
            if not waiting:
                return
            now = time.monotonic()
            for p in waiting:
                if signs.get(p, "") != seen[p][0]:
                    seen[p] = (signs[p], now)
            missing = sorted(p for p in waiting if now - seen[p][1] > self.timeout_s)
            if missing:
                raise MissingProcessError(
                    f"{self.title} failed: no sign of life for {self.timeout_s:.0f} s from "
                    f"process {', '.join(map(str, missing))} of {self.num_processes}"
                )
            time.sleep(min(self.timeout_s / BEATS, 0.2))

    def forget(self, stage: str) -> None:
        """Deletes what the first process alone reads, once it has: jobs hold many meetings."""
        if self._client is not None:
            with self._answering():
                for kind in (stage, ALIVE):
                    self._client.key_value_delete(f"{self._prefix}/{kind}/")

    def _set(self, kind: str, text: str) -> None:
        with self._answering():
            key = f"{self._prefix}/{kind}/{self.process}"
            self._client.key_value_set(key, text, allow_overwrite=True)

    def _all(self, kind: str) -> dict[int, str]:
        with self._answering():
            found = self._client.key_value_dir_get(f"{self._prefix}/{kind}/")
        return {int(key.rsplit("/", 1)[1]): text for key, text in found}

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of XLA's own class, which JAX does not make public
            raise MissingProcessError(
                f"{self.title} failed: process 0 of {self.num_processes}, where the job's "
                f"coordinator runs, does not answer ({first_line(error)})"
            ) from error
