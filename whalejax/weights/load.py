"""Loading a Hugging Face directory, tensor by tensor, straight to its place."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.quantization import QuantizedArray
from whalejax.kernels.quantization.array import scales_shape
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder
from whalejax.storage.safetensors_files import SCALE_SUFFIX, StoredTensor, find_tensors
from whalejax.weights.config_json import read_config
from whalejax.weights.names import (
    IGNORED_ENDINGS,
    Slot,
    dotted,
    mtp_copies,
    parameter_shapes,
    slots,
    takes_fp8,
)

TILE = (128, 128)  # of published FP8 weights
SHOWN = 20  # tensors of each kind of fault that an error names
FP8 = (jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2"))
FLOATS = (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16"))
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def from_pretrained(
    path: Path | str, *, dtype: Any = None, sharding: Sharding | None = None
) -> Decoder:
    """Loads a model from a Hugging Face directory of `deepseek_v2` or `deepseek_v3`.

    MTP modules are left out where the files lack them, as many published exports do.

    Args:
      path: the directory: `config.json` and safetensors, one file or several with an index.
      dtype: of the parameters; None keeps each as it is stored, FP8 with its scales included.
      sharding: from a parameter's dotted path and shape to where it goes; None for the default
        device.

    Returns:
      The model, each parameter placed as it was read: the host holds about one tensor at a time.

    Raises:
      FileNotFoundError: the directory or a file of it does not exist.
      ValueError: `config.json` or a file is corrupt, or tensors are missing, extra, of another
        shape or of an unusable dtype: one error lists them all, before anything is placed.
    """
    config, stored, wanted = _survey(Path(path))
    graphdef, state = nnx.split(_abstract(config))
    by_parameter: dict[str, list[Slot]] = {}
    for slot in wanted:
        by_parameter.setdefault(slot.parameter, []).append(slot)

    def fill(tree_path, leaf):
        name = dotted(tree_path)
        place = None if sharding is None else functools.partial(sharding, name)
        return assemble(by_parameter[name], leaf, stored, dtype, place)

    state = jax.tree_util.tree_map_with_path(fill, state)
    return nnx.merge(graphdef, state)


def check_pretrained(path: Path | str) -> ModelConfig:
    """Checks a directory as `from_pretrained` does, loads nothing, and returns its model's config.

    Raises:
      FileNotFoundError, ValueError: as `from_pretrained`.
    """
    return _survey(Path(path))[0]


def _survey(path: Path) -> tuple[ModelConfig, dict[str, StoredTensor], list[Slot]]:
    """Config, stored tensors and their places, once all is checked."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory")
    config, stored = read_config(path), find_tensors(path)
    if config.num_nextn_predict_layers and not any(
        name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in stored
    ):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    wanted = list(slots(config, parameter_shapes(nnx.state(_abstract(config)))))
    check_tensors(path, config, wanted, stored)
    return config, stored, wanted


def _abstract(config: ModelConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def check_tensors(
    path: Path, config: ModelConfig, wanted: list[Slot], stored: dict[str, StoredTensor]
) -> None:
    """Raises one ValueError that lists all missing, extra, misshapen and unusable tensors."""
    copies = mtp_copies(config)
    expected = {slot.name: slot.shape for slot in wanted}
    usable = {slot.name: FLOATS + FP8 if takes_fp8(slot) else FLOATS for slot in wanted}
    unusable = [
        f"{name} {tensor.dtype}"
        for name, tensor in stored.items()
        if tensor.dtype not in usable.get(name.removesuffix(SCALE_SUFFIX), (tensor.dtype,))
        or (name.endswith(SCALE_SUFFIX) and tensor.dtype in FP8)
    ]
    missing = [name for name in expected if name not in stored]
    extra, misshapen = [], []
    for name, tensor in stored.items():
        base = name.removesuffix(SCALE_SUFFIX)
        if name in expected:
            shape: tuple[int, ...] | None = expected[name]
        elif base != name and base in expected and base in stored:
            shape = scales_shape(expected[base], TILE)
        elif name in copies or base in copies or name.endswith(IGNORED_ENDINGS):
            continue
        else:
            extra.append(name)
            continue
        if tensor.shape != shape:
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
    scaleless = [
        f"{name} (FP8 without {name}{SCALE_SUFFIX})"
        for name in expected
        if name in stored and stored[name].dtype in FP8 and name + SCALE_SUFFIX not in stored
    ]
    faults = {
        "missing": missing + scaleless,
        "extra": extra,
        "misshapen": misshapen,
        "of an unusable dtype": unusable,
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
            for kind, names in faults.items()
            if names
        )
        raise ValueError(f"{path} does not hold the model of its config.json: {listed}")


def assemble(
    parts: list[Slot],
    leaf: jax.ShapeDtypeStruct,
    stored: dict[str, StoredTensor],
    dtype: Any,
    place: Callable | None,
) -> Any:
    """One parameter of ours from its tensors; without a dtype FP8 stays FP8 if all parts are."""
    kinds = {stored[slot.name].dtype for slot in parts}
    router_bias = parts[0].name.endswith("e_score_correction_bias")
    if dtype is None and len(kinds) == 1 and (kind := next(iter(kinds))) in FP8:
        values = stack(parts, leaf.shape, kind, lambda slot: stored[slot.name].read(), place)
        scales = stack(
            parts,
            scales_shape(leaf.shape, TILE),
            np.dtype(np.float32),
            lambda slot: stored[slot.name + SCALE_SUFFIX].read().astype(np.float32),
            place,
        )
        return QuantizedArray(values, scales, TILE)
    plain = kinds - set(FP8)
    if dtype is not None:
        target = jnp.dtype(dtype)
    else:
        target = plain.pop() if len(plain) == 1 else FLOATS[0]  # float32 holds every mixture
    if router_bias:
        target = accumulator(target)  # a bfloat16 bias could not move by gamma

    def read(slot: Slot) -> np.ndarray:
        tensor = stored[slot.name].read()
        if tensor.dtype in FP8:
            scales = stored[slot.name + SCALE_SUFFIX].read()
            tensor = dequantize(tensor, scales)
        return tensor.astype(target, copy=False)

    return stack(parts, leaf.shape, target, read, place)


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`f32[M, K]` of an FP8 tensor on the host, tile row by tile row to hold little."""
    out = values.astype(np.float32)
    columns = np.arange(values.shape[1]) // TILE[1]
    for row in range(scales.shape[0]):
        rows = slice(row * TILE[0], (row + 1) * TILE[0])
        out[rows] *= scales[row].astype(np.float32)[columns]
    return out


def stack(
    parts: list[Slot],
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[Slot], np.ndarray],
    place: Callable | None,
) -> jax.Array:
    """Writes each part into its place of an array that is already where it belongs."""
    sharding = None if place is None else place(shape)
    if not parts[0].index:
        return jax.device_put(read(parts[0]), sharding)
    whole = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    write = _writer(sharding)
    for slot in parts:
        index = (*slot.index, *(0,) * (len(shape) - len(slot.index)))
        stacked = tuple(range(len(slot.index)))
        # no name for the part: it would live while the next one is read
        whole = write(whole, np.expand_dims(read(slot), stacked), np.asarray(index, np.int32))
        whole.block_until_ready()  # else reading runs ahead and the host holds many parts
    return whole


@functools.lru_cache(maxsize=64)
def _writer(sharding: jax.sharding.Sharding | None) -> Callable:
    """In-place update of a donated array, which keeps its sharding."""

    def write(whole, part, index):
        return jax.lax.dynamic_update_slice(whole, part, tuple(index))

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
