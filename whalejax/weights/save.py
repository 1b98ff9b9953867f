"""Saving a model as a Hugging Face directory, tensor by tensor."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.decoder import Decoder
from whalejax.tokenizer import Tokenizer
from whalejax.weights.config_json import read_config, write_config
from whalejax.weights.names import SCALE_SUFFIX, dotted, mtp_copies, slots
from whalejax.weights.safetensors_files import INDEX, write_file

MAX_SHARD_BYTES = 5 * 10**9
Spec = tuple[np.dtype, tuple[int, ...]]


def save_pretrained(
    model: Decoder,
    path: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `config.json` and safetensors that `from_pretrained` and transformers read.

    Written beside its place and renamed, so an interrupted save leaves no half directory. What
    is replaced is moved aside, not deleted, until the new directory stands.

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
    temporary = path.with_name(f".{path.name}.saving")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_shards(temporary, list(tensors(model, leaves)), leaves, max_shard_bytes)
        fp8 = any(isinstance(leaf, QuantizedArray) for leaf in leaves.values())
        config = write_config(model.config, dtype=str(leaves["norm"].dtype), fp8=fp8)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
        replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def replace(new: Path, path: Path) -> None:
    """Renames directory `new` to `path`; what was there is deleted last."""
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


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


def write_shards(
    folder: Path, wanted: list[tuple[str, Spec, str, tuple, str]], leaves: dict[str, Any], most: int
) -> None:
    """Cuts the tensors into files of at most `most` bytes and writes them, with an index."""
    shards: list[list] = [[]]
    size = total = 0
    for tensor in wanted:
        dtype, shape = tensor[1]
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + nbytes, total + nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {
            tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards, strict=True):
        specs = {t[0]: (np.dtype(t[1][0]), tuple(t[1][1])) for t in shard}
        write_file(
            folder / name, specs, (_to_host(leaves[p], i, part) for _, _, p, i, part in shard)
        )


def _to_host(leaf: Any, index: tuple[int, ...], part: str) -> np.ndarray:
    array = getattr(leaf, part) if part else leaf
    return np.asarray(array[index] if index else array)
