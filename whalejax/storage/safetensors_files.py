"""Safetensors files: headers checked before use, tensors viewed in place, files written whole.

The format: eight bytes of header length, a JSON header from name to dtype, shape and byte range,
then the bytes. The safetensors package's array functions do not know FP8; ml_dtypes does.
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# The format's F4 and F6 share bytes between elements, which no array here does.
DTYPES = {
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the reference implementation's own limit
SCALE_SUFFIX = "_scale_inv"  # behind the name of an FP8 tensor: that of its scales
MAX_SHARD_BYTES = 5 * 10**9
SHOWN = 20  # tensors that an error names
METADATA = "__metadata__"  # of the header: texts by name
INDEX = "model.safetensors.index.json"
Spec = tuple[np.dtype, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `dtype[shape]` at byte `offset` of `file`."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the tensor into memory."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.nbytes)
        if len(content) != self.nbytes:
            raise ValueError(f"{self.file} ends inside a tensor at byte {self.offset}")
        return np.frombuffer(content, self.dtype).reshape(self.shape)


def view_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Tensors as they lie in their files, mapped into memory: the host need not hold them.

    The files must stay as they are while the arrays live.
    """
    maps: dict[Path, mmap.mmap] = {}
    for path in {tensor.file for tensor in tensors.values()}:
        with path.open("rb") as file:
            maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.ndarray(tensor.shape, tensor.dtype, maps[tensor.file], tensor.offset)
        for name, tensor in tensors.items()
    }


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face directory, single file or sharded with an index.

    Raises:
      FileNotFoundError: there are no safetensors files, or one that the index names is missing.
      ValueError: a file is corrupt; names it and the fault.
    """
    index, listed = folder / INDEX, {}
    if index.exists():
        listed = _read_index(index)
        files = sorted(set(listed.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names {', '.join(missing)}, not in {folder}")
        paths = [folder / name for name in files]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no safetensors file")
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in found:
                raise ValueError(f"{path} and {found[name].file} both hold {name}")
            found[name] = tensor
    if lost := [name for name in listed if name not in found]:
        shown = f"{', '.join(lost[:SHOWN])}{' …' if len(lost) > SHOWN else ''}"
        raise ValueError(f"{index} names {len(lost)} tensors that its files lack: {shown}")
    return found


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) and "/" not in name for name in names.values()):
            raise TypeError("a file name is not a plain name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    return names


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file's header holds beside its tensors; `read_header` checks the file.

    Raises:
      ValueError: they are no texts by name.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path} has a corrupt header: {METADATA} {metadata!r} is no text by name")
    return metadata


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
      ValueError: the file is cut off, or its header is not one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path} is not a safetensors file: {size} bytes, header of {length} bytes"
            )
        try:
            header = json.loads(file.read(length).decode())
            entries = {n: _entry(path, e, 8 + length) for n, e in header.items() if n != METADATA}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has a corrupt header: {error}") from None
    end = 8 + length
    for tensor in sorted(entries.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise ValueError(f"{path} is corrupt: a tensor begins at {tensor.offset}, not {end}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{path} is corrupt: {size} bytes where its header wants {end}")
    return entries


def _entry(path: Path, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is unknown")
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} or range {begin}..{end} is impossible")
    tensor = StoredTensor(
        file=path, offset=start + begin, dtype=DTYPES[entry["dtype"]], shape=shape
    )
    if tensor.nbytes != end - begin:
        raise ValueError(f"{entry['dtype']}{list(shape)} does not take {end - begin} bytes")
    return tensor


def cut(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Shares tensors out to files of at most `most` bytes, unless one tensor is larger.

    Returns:
      The names in each file, by the file's name; all in the order of `sizes`.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    most: int,
    metadata: Callable[[list[str]], Mapping[str, str]] = lambda names: {},
) -> None:
    """Cuts tensors into files of at most `most` bytes and writes them, with an index if several.

    Args:
      folder: that is there.
      specs: dtype and shape of each tensor, in order.
      read: a tensor of this name; dropped once written.
      most: bytes of a file, unless one tensor is larger.
      metadata: texts for the header of the file that holds these tensors.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    shards = cut(sizes, most)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in shards.items():
        held = {name: specs[name] for name in names}
        write_file(folder / file, held, (read(name) for name in names), metadata(names))


def write_file(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, tensor by tensor; durable when it returns.

    Args:
      path: of the file.
      specs: dtype and shape of each tensor, in order.
      tensors: the arrays, in the same order; each is dropped once written.
      metadata: texts for the header.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin on 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (dtype, shape), tensor in zip(specs.values(), tensors, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(f"{path}: {tensor.dtype}{tensor.shape} is not {dtype}{shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
