import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore, DamagedError, comparing
from whalejax.checkpoint.comparing import ContentDifference, compare_elements
from whalejax.kernels.quantization import quantize


@pytest.fixture
def save(tmp_path):
    """Saves trees as steps 1, 2, …, and gives what differs between the last two."""
    steps = []

    def save(*trees, extent_bytes=(256, 256), metadata=(None, None)):
        for tree, size, data in zip(trees, extent_bytes, metadata, strict=True):
            store = CheckpointStore(tmp_path, extent_bytes=size)
            steps.append(len(steps) + 1)
            store.save(steps[-1], tree, metadata=data, block=True)
        return store, store.diff(*steps[-2:])

    return save


def grid(rows=20, dtype=np.float32):
    return np.arange(rows * 10).astype(dtype).reshape(rows, 10)


def test_equal_checkpoints_are_equal_without_reading(save, monkeypatch):
    monkeypatch.setattr(comparing, "read_parts", None)
    tree = {"w": grid(), "k": jax.random.key(0), "e": np.zeros((0, 3)), "n": float("nan")}
    _, found = save(tree, tree, metadata=({"a": float("nan")},) * 2)
    assert found.equal and (found.by_digests, found.by_reading) == (3, 0)
    assert (
        str(found) == "3 arrays are equal by their digests, without reading them; 0 by reading them"
    )


def test_other_extents_are_compared_by_reading(save):
    tree = {"w": grid(), "s": np.float32(1), "e": np.zeros((0, 3))}
    _, found = save(tree, tree, extent_bytes=(256, 120))
    assert found.equal and (found.by_digests, found.by_reading) == (2, 1)


@pytest.mark.parametrize("extent_bytes", [(256, 256), (256, 120)], ids=["alike", "otherwise"])
@pytest.mark.parametrize("turn_bytes", [1, 2**28])
def test_differing_elements_are_counted_and_measured(save, monkeypatch, extent_bytes, turn_bytes):
    monkeypatch.setattr(comparing, "TURN_BYTES", turn_bytes)
    other = grid()
    other[3, 4] += 2  # 34
    other[17, 1] -= 0.5  # 171
    _, found = save({"w": grid()}, {"w": other}, extent_bytes=extent_bytes)
    assert found.contents == {"w": ContentDifference(2, 200, 2.0, 2 / 36)} and not found.equal
    assert str(found).startswith(
        "w: 2 of 200 elements differ, by up to 2 (relative: 0.05556)\n0 arrays"
    )


def test_extents_of_one_digest_that_lie_elsewhere_are_read(save):
    """The first row of one and the first column of the other hold the same bytes."""
    other = np.ones((4, 4), np.float32)
    other[0, 1] = 3
    mesh = jax.make_mesh((4,), ("x",))
    columns = jax.device_put(other, NamedSharding(mesh, P(None, "x")))
    store, found = save({"w": np.ones((4, 4), np.float32)}, {"w": columns}, extent_bytes=(16, 16))
    stored = [store.manifest(step).arrays["w"] for step in (1, 2)]
    assert [array.layout.chunk for array in stored] == [(1, 4), (4, 1)]
    assert stored[0].digests[0] == stored[1].digests[0]
    assert found.contents == {"w": ContentDifference(1, 16, 2.0, 2 / 3)}


def test_only_extents_that_differ_are_read(save, monkeypatch):
    other = grid()
    other[3, 4] += 2
    store, _ = save({"w": grid()}, {"w": other})
    read = []
    whole = store.place.read
    monkeypatch.setattr(store.place, "read", lambda name, *a: (read.append(name), whole(name, *a)))
    assert store.diff(1, 2).contents
    assert sorted(read) == ["1/arrays/w/c/0/0", "2/arrays/w/c/0/0"]


def test_names_layouts_values_and_metadata(save):
    first = {"a": grid(), "b": grid(), "k": jax.random.key(0), "n": 1, "s": "x", "v": grid(),
             "q": quantize(jnp.ones((4, 256), jnp.bfloat16), tile=(1, 128)), "same": 2}  # fmt: skip
    second = {"a": grid(10), "b": grid(dtype=np.int32), "k": jax.random.key(0, impl="rbg"),
              "n": 1.0, "t": "x", "v": 3, "new": grid(), "same": 2,
              "q": quantize(jnp.ones((4, 256), jnp.bfloat16), tile=(128, 128))}  # fmt: skip
    _, found = save(first, second, metadata=({"loss": 1}, {"loss": 2}))
    assert (found.only_a, found.only_b) == (("s",), ("new", "t"))
    assert found.layouts == {
        "a": ("float32[20, 10]", "float32[10, 10]"),
        "b": ("float32[20, 10]", "int32[20, 10]"),
        "k": ("uint32[2] of threefry2x32 keys", "uint32[4] of rbg keys"),
        "q/scales": ("float32[2, 128]", "float32[1, 2]"),
    }
    assert found.values["n"] == (1, 1.0) and set(found.values) == {"n", "q", "v"}
    assert found.metadata == ({"loss": 1}, {"loss": 2})
    for row in ("s: only in step 1", "new: only in step 2", "n: 1 became 1.0",
                "b: float32[20, 10] became int32[20, 10]",
                "metadata: {'loss': 1} became {'loss': 2}"):  # fmt: skip
        assert row in found.rows()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float64", "int4", "bool", "int64",
                                   "complex64", "complex128"])  # fmt: skip
def test_elements_of_every_dtype(dtype):
    a = np.array([[0, 1], [1, 0]]).astype(getattr(ml_dtypes, dtype, dtype))
    b = np.array([[0, 1], [1, 1]]).astype(a.dtype)
    measured = jnp.issubdtype(a.dtype, np.inexact)
    expected = ContentDifference(1, 4, *([1.0, 1.0] if measured else []))
    assert compare_elements(a, b) == expected
    assert compare_elements(a, a).differing == 0


@pytest.mark.parametrize(
    ("a", "b", "absolute", "relative"),
    [
        (0.0, -0.0, 0.0, 0.0),
        (np.nan, -np.nan, 0.0, 0.0),
        (np.nan, 1.0, np.nan, np.nan),
        (np.inf, 1.0, np.inf, np.inf),
        (np.inf, -np.inf, np.inf, np.inf),
        (-1.0, 1.0, 2.0, 2.0),
        (3e38, -3e38, 6e38, 2.0),
    ],
)
def test_differences_of_unusual_numbers(a, b, absolute, relative):
    found = compare_elements(np.array([a, 1, 5], np.float32), np.array([b, 1, 5], np.float32))
    assert found.differing == 1
    measured = [found.largest_absolute, found.largest_relative]
    np.testing.assert_allclose(measured, [absolute, relative], rtol=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.tuples(*[st.floats(width=32, allow_nan=False)] * 2), min_size=1))
def test_measures_are_those_of_the_worst_pair(values):
    a, b = np.array(values, np.float32).T
    found = compare_elements(a, b)
    pairs = [(float(x), float(y)) for x, y in zip(a, b, strict=True) if x.tobytes() != y.tobytes()]
    assert (found.differing, found.elements) == (len(pairs), len(values))
    assert found.largest_absolute == max((abs(x - y) for x, y in pairs), default=0)


def test_damage_is_no_difference(save, tmp_path):
    other = grid()
    other[3, 4] += 2
    store, _ = save({"w": grid()}, {"w": other})
    file = tmp_path / "2/arrays/w/c/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match="^2/arrays/w/c/0/0"):
        store.diff(1, 2)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 9; its steps: 1, 2"):
        store.diff(1, 9)
