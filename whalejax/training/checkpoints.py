"""Checkpoints of a training state; a failing disk costs a checkpoint, not the run."""

from pathlib import Path
from typing import Any

from whalejax import checkpoint
from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.orbax_folders import orbax_steps
from whalejax.checkpoint.store import RUN_FOLDER
from whalejax.model.config import ModelConfig
from whalejax.parallel.runtime import heard_by_all, is_first
from whalejax.progress import stage
from whalejax.training.step import TrainState
from whalejax.weights.runs import metadata_of

KEPT = 2  # newest checkpoints of a run


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for what is under way.

    Whatever kills a run, its last complete checkpoint restores. Where one cannot be written, that
    is told, and training goes on; only the last one of a run has to succeed.

    Args:
      run: the run's folder.
      model: sizes, kept with every checkpoint.
    """

    def __init__(self, run: Path, model: ModelConfig):
        self._store = CheckpointStore(run / RUN_FOLDER, keep=KEPT)
        old = orbax_steps(self._store.place) if is_first() else {}  # of runs before this format
        told = heard_by_all(str(max(old)) if old else "")
        self._of_orbax = int(told) if told else None
        self._newest = self.latest()
        self._metadata = metadata_of(model)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._store.__exit__(*error)

    def latest(self) -> int | None:
        """The newest complete step, None without any."""
        steps = [step for step in (self._store.latest(), self._of_orbax) if step is not None]
        self._newest = max(steps, default=None)
        return self._newest

    def save(self, step: int, state: TrainState) -> None:
        """Saves; training may go on, and donate the state, once this returns.

        A step that is there already is not saved again.
        """
        try:
            self.wait()
        except OSError as error:
            self._newest = None
            if is_first():
                stage(f"{error}; training goes on")
        if step != self._newest:
            self._store.save(step, state, metadata=self._metadata)
            self._newest = step

    def wait(self) -> None:
        """Waits for the save that is under way.

        Raises:
          OSError: it failed.
        """
        self._store.wait()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores `step` into the shapes, dtypes and shardings of `abstract`.

        Raises:
          DamagedError: something of it is not as it was written.
        """
        if step == self._of_orbax:
            return checkpoint.read_orbax(self._store.place.url, step, abstract)
        return self._store.restore(step, abstract)
