"""Every dtype that a checkpoint holds comes back bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.kernels.quantization import QuantizedArray

NUMPY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
ML_DTYPES = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e4m3b11fnuz", "float8_e8m0fnu", "float8_e4m3", "float8_e3m4"),
    *("float4_e2m1fn", "int2", "int4", "uint2", "uint4"),
)
ONLY_NUMPY = ("float6_e2m3fn", "float6_e3m2fn", "int1", "uint1")  # JAX cannot compute with them
BITS = {"float4_e2m1fn": 4, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "bool": 1}
BITS |= {"float6_e2m3fn": 6, "float6_e3m2fn": 6, "int1": 1, "uint1": 1}


def every_bit_pattern(name):
    """`name[n, 8]`: random bits, with NaNs of every payload, -0.0 and subnormals among them."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    bits = np.random.default_rng(1).integers(0, 256, (96, 8 * dtype.itemsize), np.uint8)
    if name in BITS:
        every = np.arange(2 ** BITS[name]).astype(np.uint8)
        signed = name.startswith("int")  # whose bytes are those of int8
        values = every.astype(np.int8) - (2 ** (BITS[name] - 1)) if signed else every
        bits = np.resize(values.view(np.uint8), (96, 8))
    return bits.view(dtype)


def assert_same_bits(a, b):
    """Fails unless two arrays are of one dtype, one shape, and the same bits."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        assert a.dtype == b.dtype
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_same_bits(x, y)


def shaped_like(tree):
    """The tree's abstract arrays, with their shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.parametrize("name", NUMPY_DTYPES + ML_DTYPES + ONLY_NUMPY)
def test_numpy_arrays_come_back_bit_for_bit(store, name):
    store.extent_bytes = 512
    tree = {"x": every_bit_pattern(name), "scalar": every_bit_pattern(name)[3, 3]}
    store.save(1, tree)
    store.wait()
    restored = store.restore(1)
    assert_same_bits(restored["x"], tree["x"])
    assert_same_bits(restored["scalar"], tree["scalar"])
    target = np.zeros_like(tree["x"])
    assert store.restore(1, {"x": target})["x"] is target
    assert_same_bits(target, tree["x"])


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_jax_arrays_of_every_dtype_come_back_bit_for_bit(store, mesh, x64):
    store.extent_bytes = 512
    with jax.enable_x64(x64):
        sharding = NamedSharding(mesh, P("x"))
        wide = {"int64", "uint64", "float64", "complex128"}
        names = [name for name in NUMPY_DTYPES + ML_DTYPES if x64 or name not in wide]
        tree = {name: jax.device_put(every_bit_pattern(name), sharding) for name in names}
        tree["scalar"] = jnp.bfloat16(-0.0)
        store.save(1, tree)
        store.wait()
        assert_same_tree(store.restore(1, shaped_like(tree)), tree)
        assert_same_tree(store.restore(1), jax.tree.map(np.asarray, tree))


def test_wide_numbers_are_not_narrowed_without_x64(store):
    wide = {"f": np.array([1 + 2**-40]), "i": np.array([2**40])}
    store.save(1, wide, block=True)
    assert_same_tree(store.restore(1), wide)
    with pytest.raises(ValueError, match=r"f is wanted as float64.*; i is wanted as int64"):
        store.restore(1, {n: jax.ShapeDtypeStruct((1,), x.dtype) for n, x in wide.items()})
    with jax.enable_x64(True):
        like = {n: jax.ShapeDtypeStruct((1,), x.dtype) for n, x in wide.items()}
        assert_same_tree(store.restore(1, like), wide)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back_as_keys(store, mesh, impl):
    key = jax.random.key(7, impl=impl)
    keys = jax.device_put(jax.random.split(key, 16).reshape(16, 1), NamedSharding(mesh, P("x")))
    tree = {"one": key, "many": keys}
    store.save(1, tree)
    store.wait()
    restored = store.restore(1, shaped_like(tree))
    assert_same_tree(restored, tree)
    assert restored["many"].sharding.is_equivalent_to(keys.sharding, 2)
    assert_same_tree(store.restore(1), tree)
    assert jax.random.bits(restored["one"]) == jax.random.bits(key)


def test_keys_do_not_come_back_as_those_of_another_kind(store):
    store.save(1, {"k": jax.random.key(0, impl="rbg"), "x": jnp.zeros(2)}, block=True)
    with pytest.raises(ValueError, match=r"k is key<rbg>, not key<fry>; x is no PRNG keys"):
        store.restore(1, {"k": jax.random.key(0), "x": jax.random.split(jax.random.key(0), 2)})
    with pytest.raises(ValueError, match="k is an array of PRNG keys"):
        store.restore(1, {"k": np.zeros((), np.uint32)})


@pytest.mark.parametrize("by_column", [False, True])
def test_quantized_arrays_come_back_with_either_layout_of_scales(store, by_column):
    store.extent_bytes = 2**14
    values = jnp.asarray(np.arange(256 * 384).reshape(256, 384).astype(jnp.float8_e4m3fn))
    scales = jnp.arange(384.0).reshape(3, 128) if by_column else jnp.arange(6.0).reshape(2, 3)
    tree = {"w": QuantizedArray(values, scales, scales_by_column=by_column)}
    store.save(1, tree)
    store.wait()
    assert_same_tree(store.restore(1, shaped_like(tree)), tree)
    assert_same_tree(store.restore(1), jax.tree.map(np.asarray, tree))
    store.save(2, tree["w"], block=True)
    assert_same_tree(store.restore(2, tree["w"]), tree["w"])


def test_scales_are_not_read_in_the_other_layout(store):
    store.extent_bytes = 2**16
    # of equal shapes in both layouts: only the static part tells
    w = QuantizedArray(np.zeros((128, 128), jnp.float8_e4m3fn), np.ones((128, 128)), (1, 1))
    other = QuantizedArray(w.values, w.stored_scales, (1, 1), scales_by_column=True)
    store.save(1, {"w": w}, block=True)
    with pytest.raises(ValueError, match="w is quantized with .*False.*not .*True"):
        store.restore(1, {"w": other})


def test_numbers_and_strings_come_back_as_they_were(store):
    tree = {"i": 2**80, "f": 0.1, "b": True, "s": "\ud800鯨", "n": None, "inf": float("-inf")}
    store.save(1, tree, metadata={"loss": [1.5, None], "name": "x"}, block=True)
    restored = store.restore(1)
    assert restored == {name: value for name, value in tree.items() if name != "n"}
    assert restored["b"] is True and store.restore(1, tree) == tree
    assert store.manifest(1).metadata == {"loss": [1.5, None], "name": "x"}


@pytest.mark.parametrize("tree", [{}, [], {"a": {}, "b": None}], ids=str)
def test_a_tree_without_leaves_is_a_checkpoint(store, tree):
    store.save(0, tree)
    store.wait()
    assert store.steps() == [0] and store.restore(0) == {} and store.restore(0, tree) == tree


def test_arrays_without_elements_come_back(store, mesh):
    sharded = jax.device_put(np.zeros((8, 0), np.int32), NamedSharding(mesh, P("x")))
    tree = {"a": np.zeros((0, 3), np.float32), "b": sharded}
    store.save(1, tree, block=True)
    assert store.manifest(1).nbytes == 0
    assert_same_tree(store.restore(1), tree)
    like = {"a": jax.ShapeDtypeStruct((0, 3), np.float32), "b": sharded}
    assert_same_tree(store.restore(1, like), tree)


@pytest.mark.parametrize("block", [False, True])
def test_any_order_of_bytes_and_axes_is_saved(store, block):
    x = np.arange(60.0).reshape(3, 4, 5)
    tree = {"f": np.asfortranarray(x), "step": x[::2, ::-1, 1:3], "big": x.astype(">f8")}
    store.save(1, tree, block=block)
    store.wait()
    restored = store.restore(1)
    for name, array in tree.items():
        assert_same_bits(restored[name], array.astype("<f8"))
