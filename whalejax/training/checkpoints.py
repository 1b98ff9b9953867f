"""Checkpoints of a training state; a failing disk costs a checkpoint, not the run."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from whalejax import checkpoint
from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.orbax_folders import hint, orbax_steps
from whalejax.checkpoint.store import RUN_FOLDER
from whalejax.kernels.accumulation import accumulator
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder
from whalejax.model.parameters import RouterBias
from whalejax.parallel.runtime import heard_by_all, is_first
from whalejax.progress import stage
from whalejax.training.step import TrainState
from whalejax.weights.config_json import parse_config, write_config

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
        self._metadata = {"config": write_config(model, dtype="float32", fp8=False)}

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


def is_run(path: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (path / RUN_FOLDER).is_dir()


def read_model_config(run: Path) -> ModelConfig:
    """The sizes of the model that a run trains.

    Raises:
      FileNotFoundError: it has no complete checkpoint.
    """
    return _newest(run)[2]


def load_model(run: Path, dtype: Any = None) -> Decoder:
    """The model of a run's newest checkpoint; nothing else of it is read.

    Args:
      run: the run's folder.
      dtype: of the parameters; None as they are stored.

    Raises:
      FileNotFoundError: it has no complete checkpoint.
      DamagedError: something of the model is not as it was written.
    """
    store, step, config = _newest(run)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, params, router_bias = nnx.split(abstract, nnx.Param, RouterBias)
    stored = store.manifest(step).arrays
    like = {"params": params, "router_bias": router_bias}
    target = jax.dtypes.canonicalize_dtype(dtype or stored["params/norm/value"].layout.dtype)

    def wanted(path, leaf):  # a bfloat16 bias would not be the one that was trained
        kept = path[0].key == "router_bias"
        return jax.ShapeDtypeStruct(leaf.shape, accumulator(target) if kept else target)

    found = store.restore(step, jax.tree_util.tree_map_with_path(wanted, like))
    return nnx.merge(graphdef, found["params"], found["router_bias"])


def _newest(run: Path) -> tuple[CheckpointStore, int, ModelConfig]:
    store = CheckpointStore(run / RUN_FOLDER)
    step = store.latest()
    if step is None:
        raise FileNotFoundError(
            f"{run / RUN_FOLDER} holds no complete checkpoint{hint(store.place)}"
        )
    return store, step, parse_config(store.manifest(step).metadata["config"])
