"""Saving a model as a Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.decoder import Decoder
from whalejax.storage.replacement import replacing
from whalejax.storage.safetensors_files import MAX_SHARD_BYTES, SCALE_SUFFIX, Spec, write_shards
from whalejax.tokenizer import Tokenizer
from whalejax.weights.config_json import read_config, write_config
from whalejax.weights.names import dotted, mtp_copies, slots


def save_pretrained(
    model: Decoder,
    path: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `config.json` and safetensors that `from_pretrained` and transformers read.

    An interrupted save leaves no half directory: see `whalejax.storage.replacement`.

    Args:
      model: parameters of any float dtype; quantised ones are written as FP8 with
        `weight_scale_inv`.
      path: the directory to make.
      max_shard_bytes: largest size of a file, unless one tensor is larger.
      tokenizer: saved too.
      overwrite: replace a directory that is there, if it holds such a model.

    Raises:
      ValueError: `path` is a file, or a directory with content that is not to be replaced.
    """
    path = Path(path).resolve()
    check_target(path, overwrite)
    leaves = parameters(model)
    wanted = {name: rest for name, *rest in tensors(model, leaves)}
    specs = {name: (np.dtype(dtype), shape) for name, ((dtype, shape), *_) in wanted.items()}

    def read(name: str) -> np.ndarray:
        _, parameter, index, part = wanted[name]
        return _to_host(leaves[parameter], index, part)

    with replacing(path) as temporary:
        write_shards(temporary, specs, read, max_shard_bytes)
        fp8 = any(isinstance(leaf, QuantizedArray) for leaf in leaves.values())
        config = write_config(model.config, dtype=str(leaves["norm"].dtype), fp8=fp8)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)


def check_target(path: Path, overwrite: bool) -> None:
    """Raises a ValueError unless a model may be written to `path`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the path of a directory")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path} exists: give another path, or overwrite=True")
    try:
        read_config(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{path} holds something other than a saved model ({error}): give another path"
        ) from None


def parameters(model: Decoder) -> dict[str, Any]:
    """All parameters by dotted path; quantised ones whole."""
    leaves = jax.tree_util.tree_flatten_with_path(
        nnx.state(model), is_leaf=lambda x: isinstance(x, QuantizedArray)
    )[0]
    return {dotted(path): leaf for path, leaf in leaves}


def tensors(model: Decoder, leaves: dict[str, Any]) -> Iterator[tuple[str, Spec, str, tuple, str]]:
    """Name, dtype and shape, our parameter, index and part of every tensor to write."""
    config = model.config
    wanted = [
        (s.name, s.parameter, s.index)
        for s in slots(config, {name: leaf.shape for name, leaf in leaves.items()})
    ]
    wanted += [(name, ours, ()) for name, ours in mtp_copies(config).items()]
    for name, parameter, index in wanted:
        leaf = leaves[parameter]
        if not isinstance(leaf, QuantizedArray):
            yield name, (leaf.dtype, leaf.shape[len(index) :]), parameter, index, ""
            continue
        for part, suffix in (("values", ""), ("scales", SCALE_SUFFIX)):
            array = getattr(leaf, part)
            yield name + suffix, (array.dtype, array.shape[len(index) :]), parameter, index, part


def _to_host(leaf: Any, index: tuple[int, ...], part: str) -> np.ndarray:
    array = getattr(leaf, part) if part else leaf
    return np.asarray(array[index] if index else array)
