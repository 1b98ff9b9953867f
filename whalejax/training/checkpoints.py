"""Checkpoints of a training state; a failing disk costs a checkpoint, not the run."""

from pathlib import Path
from typing import Any

from whalejax.checkpoint import CheckpointStore
from whalejax.model.config import ModelConfig
from whalejax.parallel.runtime import is_first
from whalejax.progress import stage
from whalejax.training.step import TrainState
from whalejax.weights.config_json import write_config

KEPT = 2  # newest checkpoints of a run
FOLDER = "checkpoints"  # of them, in the run's


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for what is under way.

    Whatever kills a run, its last complete checkpoint restores. Where one cannot be written, that
    is told, and training goes on; only the last one of a run has to succeed.

    Args:
      run: the run's folder.
      model: sizes, kept with every checkpoint.
    """

    def __init__(self, run: Path, model: ModelConfig):
        self._store = CheckpointStore(run / FOLDER, keep=KEPT)
        self._metadata = {"config": write_config(model, dtype="float32", fp8=False)}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._store.__exit__(*error)

    def latest(self) -> int | None:
        """The newest complete step, None without any."""
        return self._store.latest()

    def save(self, step: int, state: TrainState) -> None:
        """Saves; training may go on, and donate the state, once this returns.

        A step that is there already is not saved again.
        """
        try:
            self._store.wait()
        except OSError as error:
            if is_first():
                stage(f"{error}; training goes on")
        if step != self._store.latest():
            self._store.save(step, state, metadata=self._metadata)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores `step` into the shapes, dtypes and shardings of `abstract`.

        Raises:
          DamagedError: something of it is not as it was written.
        """
        return self._store.restore(step, abstract)
