"""What users store: a change of a byte here is a change of format, and takes a new version."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.layout import UNKNOWN_TO_ZARR, ArrayLayout, zarr_json
from whalejax.checkpoint.manifest import decode

DTYPES = ("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint2", "uint4", "uint8",
          "uint16", "uint32", "uint64", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz",
          "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "bfloat16",
          "float16", "float32", "float64", "complex64", "complex128")  # fmt: skip

# what a byte holds of these, from and to below
NARROW = {"bool": (0, 2), "int2": (-2, 2), "int4": (-8, 8), "uint2": (0, 4), "uint4": (0, 16)}


def tree():
    return {
        "layer 1": {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.float32(-0.5)},
        "bf16": np.array([1, -2, 3], ml_dtypes.bfloat16),
        "key": jax.random.key(7),
        "steps": 12,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    store = CheckpointStore(folder, extent_bytes=16)
    store.save(5, tree(), metadata={"loss": 0.25}, block=True)
    return folder / "5"


MANIFEST = (
    '{"crc32c": "48ed864c", "xxh3": "44e52802acc82cac", "content":\n'
    '{"arrays":{"bf16":{"chunk":[3],"crc32c":["4097362f"],"dtype":"bfloat16","shape":[3],'
    '"xxh3":["86a57665b90cfa08"]},'
    '"key":{"chunk":[2],"crc32c":["95280a40"],"dtype":"uint32","key":"threefry2x32",'
    '"shape":[2],"xxh3":["1d0adaa54ee14395"]},'
    '"layer%201/b":{"chunk":[],"crc32c":["a461052a"],"dtype":"float32","shape":[],'
    '"xxh3":["7d99fbe36c125803"]},'
    '"layer%201/w":{"chunk":[2,2],"crc32c":["515dc834","61e940cc"],"dtype":"float32",'
    '"shape":[3,2],"xxh3":["0aee2086d517557e","afe6193ba934b156"]}},'
    '"created":"2026-01-01T00:00:00+00:00","format":"whalejax.checkpoint",'
    '"metadata":{"loss":0.25},"quantized":{},"step":5,"values":{"steps":12},"version":1}'
    "\n}\n"
)
EXTENTS = {
    "arrays/bf16/c/0": "803f00c04040",
    "arrays/key/c/0": "0000000007000000",
    "arrays/layer%201/b/c": "000000bf",
    "arrays/layer%201/w/c/0/0": "000000000000803f0000004000004040",
    "arrays/layer%201/w/c/1/0": "000080400000a0400000000000000000",
}
ZARR_JSON = """{
 "zarr_format": 3,
 "node_type": "array",
 "shape": [
  3,
  2
 ],
 "data_type": "float32",
 "chunk_grid": {
  "name": "regular",
  "configuration": {
   "chunk_shape": [
    2,
    2
   ]
  }
 },
 "chunk_key_encoding": {
  "name": "default",
  "configuration": {
   "separator": "/"
  }
 },
 "fill_value": 0,
 "codecs": [
  {
   "name": "bytes",
   "configuration": {
    "endian": "little"
   }
  }
 ],
 "attributes": {}
}
"""
ONE_BYTE = {"codecs": [{"name": "bytes"}]}


def test_the_files_and_the_bytes_of_extents(folder):
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes().hex()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("zarr.json", "manifest.json")
    }
    assert found == EXTENTS


def test_the_bytes_of_the_manifest(folder):
    data = (folder / "manifest.json").read_bytes()
    manifest = decode(data, "manifest.json")
    assert manifest.encode() == data
    fixed = dataclasses.replace(manifest, created="2026-01-01T00:00:00+00:00")
    assert fixed.encode().decode() == MANIFEST


def test_a_manifest_that_was_written_then_is_read(folder):
    manifest = decode(MANIFEST.encode(), "manifest.json")
    assert (manifest.step, manifest.metadata, manifest.values) == (5, {"loss": 0.25}, {"steps": 12})
    today = decode((folder / "manifest.json").read_bytes(), "manifest.json")
    assert manifest.arrays == today.arrays


def test_the_bytes_of_zarr_json(folder):
    assert (folder / "arrays/layer%201/w/zarr.json").read_text() == ZARR_JSON


@pytest.mark.parametrize(
    ("dtype", "key", "changed"),
    [
        ("bool", None, {"data_type": "bool", "fill_value": False, **ONE_BYTE}),
        ("float8_e4m3fn", None, {"data_type": "float8_e4m3fn", **ONE_BYTE}),
        ("complex64", None, {"data_type": "complex64", "fill_value": [0, 0]}),
        ("uint4", None, {"data_type": "uint8", **ONE_BYTE, "attributes": {"dtype": "uint4"}}),
        ("uint32", "rbg", {"data_type": "uint32", "attributes": {"prng": "rbg"}}),
    ],
)
def test_the_bytes_of_other_zarr_json(dtype, key, changed):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    layout = ArrayLayout(shape=(3, 2), dtype=dtype, chunk=(2, 2), key=key)
    expected = json.dumps(json.loads(ZARR_JSON) | changed, indent=1) + "\n"
    assert zarr_json(layout).decode() == expected


def random_array(dtype, shape):
    """Of all bytes, NaNs among them, where every byte is a value."""
    rng = np.random.default_rng(0)
    if dtype.name in NARROW:
        return rng.integers(*NARROW[dtype.name], shape).astype(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=str)
def test_tensorstore_opens_arrays_of_every_dtype(tmp_path, dtype, shape):
    array = random_array(np.dtype(getattr(ml_dtypes, dtype, dtype)), shape)
    CheckpointStore(tmp_path, extent_bytes=16).save(1, {"a": array}, block=True)
    path = str(tmp_path / "1/arrays/a")
    opened = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
    read = opened.read().result()
    expected = array.view(np.uint8) if dtype in UNKNOWN_TO_ZARR else array
    assert read.dtype == expected.dtype and read.shape == shape
    assert read.tobytes() == expected.tobytes()


def test_tensorstore_opens_every_array_of_a_checkpoint(folder):
    arrays = {
        "layer%201/w": tree()["layer 1"]["w"],
        "layer%201/b": tree()["layer 1"]["b"],
        "bf16": tree()["bf16"],
        "key": jax.random.key_data(tree()["key"]),
    }
    found = {path.parent.relative_to(folder / "arrays") for path in folder.rglob("zarr.json")}
    assert {path.as_posix() for path in found} == set(arrays)
    for name, array in arrays.items():
        kvstore = {"driver": "file", "path": str(folder / "arrays" / name)}
        opened = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
        np.testing.assert_array_equal(opened.read().result(), np.asarray(array), strict=True)
