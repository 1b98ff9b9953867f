"""Checkpoints of a training state through Orbax's CheckpointManager."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from whalejax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for writes under way.

    Orbax writes a step beside its place and renames it, so whatever kills a run, the last complete
    step restores.

    Args:
      folder: where they lie; made at the first save.
      keep: newest checkpoints that are kept.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Saves; training may go on, and donate the state, once this returns."""
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores `step` into the shapes, dtypes and shardings of `abstract`."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
