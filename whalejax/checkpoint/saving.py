"""A save under way: in a thread of its own, together with those of the job's other processes."""

import atexit
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from whalejax.checkpoint.manifest import Manifest
from whalejax.checkpoint.planning import Plan
from whalejax.checkpoint.processes import Meeting, MissingProcessError
from whalejax.checkpoint.snapshot import Snapshot
from whalejax.checkpoint.threads import Ending
from whalejax.checkpoint.writing import (
    Digests,
    Target,
    commit,
    make_manifest,
    metadata_files,
    part_file,
    read_part,
    write_extents,
    write_part,
)

WRITTEN, COMMITTED = "written", "committed"  # stages that processes report to each other


def save(
    target: Target,
    plan: Plan,
    snapshot: Snapshot,
    meeting: Meeting,
    *,
    step: int | None,
    metadata: Any = None,
    progressed: Callable[[int], None] = lambda nbytes: None,
) -> Manifest | None:
    """Writes this process's part of a checkpoint; the first process commits it.

    Args:
      target: where to.
      plan: what, equal in all processes.
      snapshot: this process's extents.
      meeting: with the other processes.
      step, metadata: for the manifest.
      progressed: called with the bytes of each file that stands.

    Returns:
      The manifest, in the first process.

    Raises:
      MissingProcessError: another process ended, or gave no sign of life.
      OSError: this process, or another one, could not write: the checkpoint is not there, or is
        whole but may not be durable; those before it are as they were.
      ValueError: the processes do not agree on what is to be saved.
    """
    with meeting.attended():
        if meeting.process:
            try:
                write_part(target, meeting.process, write_extents(target, snapshot, [], progressed))
            except Exception as error:
                meeting.report(WRITTEN, error)
                raise
            meeting.report(WRITTEN)
            meeting.wait_for(COMMITTED, [0])
            return None
        try:
            digests = _written_by_all(target, plan, snapshot, meeting, progressed)
            manifest = make_manifest(plan, digests, step=step, metadata=metadata)
            commit(target, manifest)
        except Exception as error:
            meeting.report(COMMITTED, error)
            raise
        meeting.report(COMMITTED)
        meeting.forget(WRITTEN)
        return manifest


def _written_by_all(
    target: Target,
    plan: Plan,
    snapshot: Snapshot,
    meeting: Meeting,
    progressed: Callable[[int], None],
) -> Digests:
    """Writes the first process's part, and collects the digests of all."""
    try:
        digests = write_extents(target, snapshot, metadata_files(plan), progressed)
        others = range(1, meeting.num_processes)
        meeting.wait_for(WRITTEN, others)
        for process in others:
            digests |= read_part(target, process)
            target.place.remove(target.file(part_file(process)))
        if missing := [str(extent) for extent in plan.writers if extent not in digests]:
            raise ValueError(
                f"{meeting.title} failed: no process wrote {len(missing)} extents, such as "
                f"{missing[0]}: the tree must be equal in all processes, its shardings too"
            )
        return digests
    except MissingProcessError:  # what was written can be kept when the job comes here again
        raise
    except OSError:
        with suppress(OSError):  # give back its room; the error at hand is the one to know
            target.place.remove_tree(target.writing)
        raise


class Background:
    """A call in a thread; `wait` raises what it raised, else the program's end prints it."""

    def __init__(self, call: Callable[[], Any], name: str):
        self._call, self._error = call, None
        self._thread = Ending(self._run, name)
        atexit.register(self._tell)  # which Python calls once all threads have ended

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def _tell(self) -> None:
        if self._error is not None:
            traceback.print_exception(self._error)

    def join(self) -> None:
        """Waits for its end."""
        self._thread.wait()

    def wait(self) -> None:
        """Waits for its end.

        Raises:
          BaseException: what it raised, once.
        """
        self._thread.wait()
        atexit.unregister(self._tell)
        error, self._error = self._error, None
        if error is not None:
            raise error
