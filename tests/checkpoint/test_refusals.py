"""What a CheckpointStore refuses, before it writes or reads anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from whalejax.checkpoint import CheckpointStore


@pytest.mark.parametrize("options", [{"keep": 0}, {"extent_bytes": 0}, {"timeout_s": 0}], ids=str)
def test_sizes_that_are_not_positive_are_refused(tmp_path, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}.* must be positive"):
        CheckpointStore(tmp_path, **options)


LOOP = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("step", "tree", "metadata", "error", "told"),
    [
        (-1, {}, None, ValueError, "step=-1 must be a number that .* does not hold"),
        (7, {}, None, ValueError, "step=7 must be"),
        (1.0, {}, None, TypeError, "float"),
        ("1", {}, None, TypeError, "str"),
        (1, {}, {"a": object()}, ValueError, "is no JSON: Object of type object"),
        (1, {}, {1: 2, "a": 3}, ValueError, "is no JSON: '<' not supported"),
        (1, {}, LOOP, ValueError, "is no JSON: Circular"),
        (1, {"a": {"b": b"x"}}, None, TypeError, "not a/b: bytes"),
        (1, {"a" * 256: 1}, None, ValueError, "more than 255 bytes"),
    ],
)
@pytest.mark.parametrize("block", [False, True])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    store, spied, step, tree, metadata, error, told, block
):
    store.save(7, {"x": np.arange(3)}, block=True)
    spied.written.clear()
    with pytest.raises(error, match=told):
        store.save(step, tree, metadata=metadata, block=block)
    assert spied.written == [] and store.steps() == [7] and store.unfinished() == []


def test_steps_of_any_integer_type_are_numbers(store):
    for step in (np.int64(3), jnp.int32(4)):
        store.save(step, {"x": np.arange(3)}, block=True)
    assert store.steps() == [3, 4] and store.manifest(4).step == 4


def test_what_is_not_there_is_not_restored(store):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        store.restore()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; its steps: none"):
        store.restore(3)
    store.save(1, {"x": np.arange(3)}, block=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; its steps: 1"):
        store.manifest(3)


def test_all_that_does_not_fit_is_listed_before_anything_is_read(store, spied, mesh):
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    tree = {"a": np.zeros(3), "b": np.zeros(3, np.int32), "c": np.zeros(3, bool), "v": "text"}
    tree |= {"d": np.zeros(3), "e": np.zeros(3), "f": np.zeros(3), "good": np.ones(3)}
    store.save(1, tree, block=True)
    good = np.zeros(3)
    uneven = jax.ShapeDtypeStruct((3,), np.float32, sharding=NamedSharding(mesh, P("x")))
    like = {
        "a": np.zeros(4),
        "b": np.zeros(3),
        "c": np.zeros(3, np.int8),
        "d": read_only,
        "e": uneven,
        "f": 3,
        "v": np.zeros(3),
        "missing": np.zeros(1),
        "good": good,
    }
    with pytest.raises(ValueError, match="step 1 cannot be restored so: ") as error:
        store.restore(1, like)
    for fault in (
        *("a has shape [3], not [4]", "b is int32, which does not become float64"),
        *("c is bool, which does not become int8", "v is 'text', no array"),
        *("d cannot be read into an array that is not writeable", "e cannot be cut so: "),
        *("f is an array float64[3], not 3", "missing is not in the checkpoint"),
    ):
        assert fault in str(error.value)
    assert spied.read_files == [] and not good.any()
