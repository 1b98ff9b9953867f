"""How trees are named: uniquely, reversibly, and as files may be named."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.checkpoint.tree import KEY_BYTES, ROOT, named, nested, quantized_in, take_apart
from whalejax.kernels.quantization import QuantizedArray

SEARCH = settings(max_examples=300, derandomize=True, deadline=None)
HARD_KEYS = ["", ".", "..", "/", "a/b", "%", "%%", "%2E", "~", " ", "é", "鯨", "\x00", "c", "\\"]
KEYS = st.sampled_from(HARD_KEYS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
# empty dicts are no leaves, and leave no trace
TREES = st.recursive(
    st.integers(), lambda nodes: st.dictionaries(KEYS, nodes, min_size=1, max_size=4)
)


def same(a, b):
    """Whether two trees have one structure, and equal leaves."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(x is y for x, y in leaves)


@SEARCH
@given(tree=TREES)
def test_nested_dicts_come_back_from_their_names(tree):
    leaves = take_apart(tree)
    assert nested(leaves.values, {}) == tree


@SEARCH
@given(tree=TREES)
def test_names_are_safe_as_names_of_files(tree):
    names = [name for name, _ in named(tree)]
    assert len(set(names)) == len(names)
    for name in names:
        assert name.isascii() and name.isprintable() and not set(name) & set(' \\:*?"<>|')
        assert not {"", ".", ".."} & set(name.split("/"))


@pytest.mark.parametrize("key", HARD_KEYS)
def test_hard_keys_name_files_of_their_own(tmp_path, key):
    names = [name for name, _ in named({key: 1, f"{key}.": 2, f"{key}x": {key: 3}})]
    for name in names:
        path = tmp_path / name / "zarr.json"
        path.parent.mkdir(parents=True)
        path.write_text(name)
    assert [(tmp_path / name / "zarr.json").read_text() for name in names] == names
    assert all(path.resolve().is_relative_to(tmp_path) for path in tmp_path.rglob("*"))


def test_names_that_users_see_stay_as_they_are():
    tree = {"layers": [{"w": 1}, {"w": 2}], "a b": 3, "x/y": 4, "": 5, "..": 6}
    assert dict(named(tree)) == {
        "layers/0/w": 1,
        "layers/1/w": 2,
        "a%20b": 3,
        "x%2Fy": 4,
        "%": 5,
        "%2E%2E": 6,
    }


@pytest.mark.parametrize("key", ["k" * (KEY_BYTES + 1), "鯨" * 29], ids=["ascii", "quoted"])
def test_keys_too_long_for_a_file_are_refused(key):
    with pytest.raises(ValueError, match="more than 255 bytes") as error:
        take_apart({"a": {key: 1}, "b": 2})
    assert ", b" not in str(error.value)
    assert take_apart({"a": {key[: 255 // (1 if key.isascii() else 9)]: 1}}).values


def test_keys_that_give_one_name_are_refused():
    class Node(dict):
        pass

    jax.tree_util.register_pytree_with_keys(
        Node,
        lambda node: ([(jax.tree_util.DictKey(key), node[key]) for key in node], tuple(node)),
        lambda keys, leaves: Node(zip(keys, leaves, strict=True)),
    )
    with pytest.raises(ValueError, match="several leaves are named n/1: give"):
        take_apart({"n": Node({1: 1, "1": 2, "2": 3})})


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        take_apart({"\ud800": 1})


def test_a_leaf_alone_is_not_a_leaf_without_a_key():
    assert list(take_apart(7).values) == [ROOT]
    assert list(take_apart({"": 7}).values) == ["%"]
    assert nested(take_apart(7).values, {}) == 7
    assert nested(take_apart({"": 7}).values, {}) == {"": 7}


@pytest.mark.parametrize("tree", [{}, [], None, {"a": None, "b": {}}], ids=str)
def test_a_tree_without_leaves_has_no_names(tree):
    assert take_apart(tree) == ({}, {}, {}) and nested({}, {}) == {}


def test_none_is_no_leaf():
    x = np.zeros(2)
    assert take_apart({"x": x, "none": None, "list": [None, 3]}) == ({"x": x}, {"list/1": 3}, {})


def test_all_refused_leaves_are_listed_with_their_types():
    tree = {
        "object": object(),
        "function": len,
        "bytes": b"x",
        "complex": 1j,
        "objects": np.array([None]),
        "text": np.array(["a"]),
        "dates": np.zeros(2, "M8[s]"),
        "raw": np.zeros(2, "V8"),
        "record": np.zeros(2, [("a", "f4")]),
        "long": np.zeros(2, np.longdouble),
        "abstract": jax.ShapeDtypeStruct((2,), jnp.float32),
        "quantized": QuantizedArray(jax.ShapeDtypeStruct((2, 2), jnp.float8_e4m3fn), None),
        "fine": 1,
    }
    with pytest.raises(TypeError, match="arrays, numbers and strings, not ") as error:
        take_apart(tree)
    told = str(error.value)
    for named_so in (
        *("object: object", "function: builtin_function_or_method", "bytes: bytes"),
        *("complex: complex", "objects: ndarray of object", "text: ndarray of <U1"),
        *("dates: ndarray of datetime64[s]", "raw: ndarray of |V8", "record: ndarray of [("),
        *("long: ndarray of ", "abstract: ShapeDtypeStruct of float32"),
        "quantized/values: ShapeDtypeStruct of float8_e4m3fn",
    ):
        assert named_so in told
    assert "fine" not in told


def test_numbers_of_numpy_are_arrays_and_those_of_python_values():
    tree = {"a": np.float64(1), "b": 1.5, "c": np.bool_(True), "d": True, "e": "x", "f": 2**80}
    leaves = take_apart(tree)
    assert list(leaves.arrays) == ["a", "c"] and list(leaves.values) == ["b", "d", "e", "f"]
    assert leaves.values["d"] is True


def quantized(by_column=False):
    """A QuantizedArray of 2 x 3 tiles."""
    values = np.zeros((256, 384), ml_dtypes.float8_e4m3fn)
    array = QuantizedArray(jnp.asarray(values), jnp.ones((2, 3)), (128, 128))
    return array.with_scales_by_column() if by_column else array


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: {"": q}, lambda q: {"a/b": {"c": q}}])
def test_quantized_arrays_come_back_with_their_static_parts(by_column, wrap):
    tree = wrap(quantized(by_column))
    arrays, values, static = take_apart(tree)
    assert values == {} and len(arrays) == 2
    assert list(static.values()) == [{"tile": [128, 128], "scales_by_column": by_column}]
    assert same(nested(arrays, static), tree)


def test_a_quantized_array_that_is_the_tree_names_its_parts_as_like_does():
    whole = take_apart(quantized())
    assert list(whole.arrays) == [name for name, _ in named(quantized())] == ["values", "scales"]


def test_half_of_a_quantized_array_comes_back_as_it_is_stored():
    arrays, _, static = take_apart({"w": quantized(), "x": np.zeros(1)})
    half = nested({"w/values": arrays["w/values"]}, static)
    assert list(half) == ["w"] and list(half["w"]) == ["values"]
    assert list(nested({"x": arrays["x"]}, static)) == ["x"]


def test_abstract_quantized_arrays_tell_their_static_parts():
    tree = {"w": quantized(True)}
    assert quantized_in(jax.eval_shape(lambda: tree)) == quantized_in(tree)


def test_the_state_of_a_flax_model_has_a_name_for_every_leaf():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    state = nnx.state(model)
    arrays, values, _ = take_apart(state)
    assert len(arrays) == len(jax.tree.leaves(state)) and values == {}
    assert {"layers/0/kernel", "layers/0/bias"} <= {n.removesuffix("/value") for n in arrays}
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays.values())


def test_the_state_of_an_optimizer_has_a_name_for_every_leaf():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = optimizer.init({"w": jnp.zeros(3)})
    arrays, values, _ = take_apart(state)
    assert len(arrays) == len(jax.tree.leaves(state)) and values == {}
    assert "1/0/mu/w" in arrays and "1/0/count" in arrays
