import sys
import types

import pytest

from whalejax.kernels import backend

TABLE = {"fast": "test_backend_fast", "slow": "test_backend_slow"}


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    for name, limit in (("fast", 10), ("slow", 100)):
        module = types.ModuleType(f"test_backend_{name}")
        module.why_not = lambda n, limit=limit: None if n <= limit else f"n={n} is over {limit}"
        if name == "fast":
            module.unusable = lambda: "no such device"
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_first_that_can_is_chosen():
    assert backend.choose("op", TABLE, None, 5).__name__ == "test_backend_fast"
    assert backend.choose("op", TABLE, None, 50).__name__ == "test_backend_slow"


def test_a_named_one_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match="op: .*'fast' cannot run: n=50 is over 10"):
        backend.choose("op", TABLE, "fast", 50)


def test_all_reasons_where_none_can():
    with pytest.raises(NotImplementedError, match="over 10.*over 100"):
        backend.choose("op", TABLE, None, 500)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'quick' is unknown; choose from \['fast', 'slow'\]"):
        backend.choose("op", TABLE, "quick", 5)


def test_unusable_is_asked_where_it_is_defined():
    assert backend.unusable("test_backend_fast") == "no such device"
    assert backend.unusable("test_backend_slow") is None


def test_mosaic_is_unusable_below_its_jax(monkeypatch):
    monkeypatch.setattr(backend.jax, "__version_info__", (0, 11, 1))
    assert "need jax>=0.11.2" in backend.mosaic_unusable()
