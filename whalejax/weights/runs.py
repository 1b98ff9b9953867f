"""The model of a training run, from the newest of its checkpoints."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.orbax_folders import hint
from whalejax.checkpoint.store import RUN_FOLDER
from whalejax.kernels.accumulation import accumulator
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder
from whalejax.model.parameters import RouterBias
from whalejax.weights.config_json import parse_config, write_config

CONFIG = "config"  # in a checkpoint's metadata: the keys of a `config.json`


def metadata_of(model: ModelConfig) -> dict[str, Any]:
    """What a run keeps with its checkpoints, so that its model can be made again."""
    return {CONFIG: write_config(model, dtype="float32", fp8=False)}


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
    return store, step, parse_config(store.manifest(step).metadata[CONFIG])
