"""A store of small files, and a place that is spied on."""

import threading

import jax
import pytest
from jax.sharding import AxisType

from whalejax.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path):
    """A store whose files are small."""
    with CheckpointStore(tmp_path / "run", extent_bytes=64) as store:
        yield store


@pytest.fixture
def mesh():
    """Eight devices along one axis."""
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


class Spied:
    """A place that notes what is read and written, and waits or fails where it is told to."""

    def __init__(self, place):
        self._place = place
        self.read_files, self.written, self.fails = [], [], None
        self.open = threading.Event()
        self.open.set()

    def __getattr__(self, name):
        return getattr(self._place, name)

    def read(self, name, *args):
        """As `Place.read`."""
        self.read_files.append(name)
        return self._place.read(name, *args)

    def write(self, name, *args):
        """As `Place.write`."""
        assert self.open.wait(60)
        if self.fails and self.fails in name:
            raise OSError(28, "No space left on device", name)
        self.written.append(name)
        return self._place.write(name, *args)


@pytest.fixture
def spied(store):
    """The place of `store`, spied on."""
    store.place = Spied(store.place)
    yield store.place
    store.place.open.set()
