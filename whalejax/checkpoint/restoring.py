"""From a checkpoint to a pytree: on this mesh, in these dtypes, all of it or a subtree."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from whalejax.checkpoint.faults import SHOWN
from whalejax.checkpoint.layout import Box, lengths
from whalejax.checkpoint.manifest import Manifest, StoredArray
from whalejax.checkpoint.reading import Part, read_parts
from whalejax.checkpoint.tree import VALUES, is_key, named, nested, quantized_in
from whalejax.storage import Place
from whalejax.storage.memory import Arena, host_array, padded

# Host memory for what goes on to other devices: two such buffers, one filled while the other is
# sent; larger only where one array's parts are.
BUFFER_BYTES = 2**30
Allocate = Callable[[Sequence[int], np.dtype], np.ndarray]


def restore_nested(place: Place, folder: str, manifest: Manifest, **options: Any) -> Any:
    """A whole checkpoint as nested dicts of NumPy arrays, PRNG keys, numbers and strings.

    Args:
      place, folder: where it lies.
      manifest: of it.
      **options: of `read_parts`.

    Raises:
      DamagedError: an extent is damaged or missing.
    """
    arrays = {
        name: host_array(stored.layout.shape, stored.layout.dtype)
        for name, stored in manifest.arrays.items()
    }
    wanted = {name: (manifest.arrays[name], [whole(array)]) for name, array in arrays.items()}
    read_parts(place, folder, wanted, **options)
    keys = {name: stored.layout.key for name, stored in manifest.arrays.items()}
    leaves = {
        name: jax.random.wrap_key_data(jnp.asarray(array), impl=keys[name]) if keys[name] else array
        for name, array in arrays.items()
    }
    return nested(leaves | manifest.values, manifest.quantized)


def restore_like(place: Place, folder: str, manifest: Manifest, like: Any, **options: Any) -> Any:
    """The part of a checkpoint that `like` names, in its structure, dtypes and shardings.

    Args:
      place, folder: where the checkpoint lies.
      manifest: of it.
      like: arrays, concrete or abstract; NumPy arrays are filled in place.
      **options: of `read_parts`.

    Raises:
      ValueError: `like` asks for what is not there, or not so; lists all, before anything is read.
      DamagedError: an extent of it is damaged or missing.
    """
    wanted = dict(named(like))
    check(manifest, wanted, quantized_in(like))
    leaves = {name: manifest.values[name] for name in wanted if name in manifest.values}
    filled = {name: leaf for name, leaf in wanted.items() if isinstance(leaf, np.ndarray)}
    filled |= {n: np.empty((), x.dtype) for n, x in wanted.items() if isinstance(x, np.generic)}
    parts = {name: (manifest.arrays[name], [whole(leaf)]) for name, leaf in filled.items()}
    read_parts(place, folder, parts, **options)
    leaves |= filled
    targets = [
        _Target(name, manifest.arrays[name], leaf)
        for name, leaf in wanted.items()
        if name not in leaves
    ]
    buffers, sent = (Arena(), Arena()), []
    for turn, group in enumerate(_groups(targets)):
        if turn >= len(buffers):
            jax.block_until_ready(sent[turn - len(buffers)])  # its buffer is used again
        allocate = _allocator(group, buffers[turn % len(buffers)])
        parts = {target.name: (target.stored, target.parts(allocate)) for target in group}
        read_parts(place, folder, parts, **options)
        sent.append({target.name: target.array() for target in group})
        leaves |= sent[-1]
    jax.block_until_ready(sent)  # before the buffers go
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


class _Target:
    """A leaf on its way: its parts on the host, and the array that they become."""

    def __init__(self, name: str, stored: StoredArray, leaf: Any):
        self.name, self.stored, self.leaf = name, stored, leaf
        shape = stored.layout.shape
        self.dtype = stored.layout.dtype if is_key(leaf) else np.dtype(leaf.dtype)
        self.sharding = getattr(leaf, "sharding", None)
        if self.sharding is None:
            self.sharding = SingleDeviceSharding(jax.local_devices()[0])
        indices = self.sharding.addressable_devices_indices_map(shape)
        self.boxes: dict[jax.Device, Box] = {
            device: tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
            for device, index in indices.items()
        }

    @property
    def nbytes(self) -> int:
        """Host memory that all parts need, each on a page of its own."""
        sizes = (np.prod(lengths(box), dtype=np.int64) for box in set(self.boxes.values()))
        return sum(padded(int(size) * self.dtype.itemsize) for size in sizes)

    @property
    def on_host(self) -> bool:
        """Whether the array's memory is the host's: then it takes over that of its parts."""
        return all(device.platform == "cpu" for device in self.boxes)

    def parts(self, allocate: Allocate) -> list[Part]:
        """The distinct parts, and memory for them."""
        self.memory = {
            box: allocate(lengths(box), self.dtype) for box in dict.fromkeys(self.boxes.values())
        }
        return [Part(box, memory) for box, memory in self.memory.items()]

    def array(self) -> jax.Array:
        """The array, its transfers under way."""
        pieces = [jax.device_put(self.memory[box], device) for device, box in self.boxes.items()]
        shape = self.stored.layout.shape
        array = jax.make_array_from_single_device_arrays(
            shape, self.sharding, pieces, dtype=self.dtype
        )
        if is_key(self.leaf):
            return jax.random.wrap_key_data(array, impl=self.stored.layout.key)
        return array


def _groups(targets: list[_Target]) -> Iterator[list[_Target]]:
    """Those on the host at once, as they need no buffer; others as many as fit one."""
    if on_host := [target for target in targets if target.on_host]:
        yield on_host
    group: list[_Target] = []
    for target in targets:
        if target.on_host:
            continue
        if group and sum(t.nbytes for t in group) + target.nbytes > BUFFER_BYTES:
            yield group
            group = []
        group.append(target)
    if group:
        yield group


def _allocator(group: list[_Target], buffer: Arena) -> Allocate:
    if group[0].on_host:
        return host_array
    room, start = buffer.reserve(sum(target.nbytes for target in group)), 0

    def allocate(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        nonlocal start
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = room[start : start + nbytes].view(dtype).reshape(shape)
        start += padded(nbytes)
        return memory

    return allocate


def check(manifest: Manifest, wanted: dict[str, Any], quantized: dict[str, Any]) -> None:
    """Raises one ValueError that lists all that is asked for and cannot be had.

    Args:
      manifest: of the checkpoint.
      wanted: leaves by name.
      quantized: the static parts of the QuantizedArrays among them.
    """
    faults = [
        f"{name} is quantized with {manifest.quantized[name]}, not {static}"
        for name, static in quantized.items()
        if manifest.quantized.get(name, static) != static
    ]
    for name, leaf in wanted.items():
        if name in manifest.arrays:
            fault = _unfit(manifest.arrays[name], leaf)
        elif name in manifest.values:
            fault = None if isinstance(leaf, VALUES) else f"is {manifest.values[name]!r}, no array"
        else:
            fault = "is not in the checkpoint"
        if fault is not None:
            faults.append(f"{name} {fault}")
    if faults:
        more = len(faults) - SHOWN
        shown = "; ".join(faults[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        what = "the item" if manifest.step is None else f"step {manifest.step}"
        raise ValueError(f"{what} cannot be restored so: {shown}")


def _unfit(stored: StoredArray, leaf: Any) -> str | None:
    layout = stored.layout
    if not hasattr(leaf, "shape"):
        return f"is an array {layout.dtype.name}{list(layout.shape)}, not {leaf!r}"
    if is_key(leaf) != (layout.key is not None):
        return f"is {'an array of' if layout.key else 'no'} PRNG keys"
    shape = layout.shape[: len(layout.shape) - is_key(leaf)]
    if tuple(leaf.shape) != shape:
        return f"has shape {list(shape)}, not {list(leaf.shape)}"
    if getattr(leaf, "sharding", None) is not None:
        try:
            leaf.sharding.shard_shape(shape)
        except ValueError as error:
            return f"cannot be cut so: {error}"
    if is_key(leaf):
        stored_dtype = jax.eval_shape(lambda: jax.random.key(0, impl=layout.key)).dtype
        return None if leaf.dtype == stored_dtype else f"is {stored_dtype}, not {leaf.dtype}"
    if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:
        return "cannot be read into an array that is not writeable"
    if _kind(layout.dtype) != _kind(np.dtype(leaf.dtype)):
        return f"is {layout.dtype.name}, which does not become {np.dtype(leaf.dtype).name}"
    if isinstance(leaf, np.ndarray | np.generic):
        return None
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return f"is wanted as {leaf.dtype.name}, which JAX has only with jax_enable_x64"
    return None


def _kind(dtype: np.dtype) -> str:
    """Among dtypes of one kind elements are converted: floats, integers."""
    for kind in (np.floating, np.signedinteger, np.unsignedinteger, np.complexfloating):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return dtype.name


def whole(array: np.ndarray) -> Part:
    """An array on the host as the one part of itself."""
    return Part(tuple((0, length) for length in array.shape), array)
