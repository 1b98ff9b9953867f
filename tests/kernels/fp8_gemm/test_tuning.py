import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.fp8_gemm import tuning
from whalejax.kernels.fp8_gemm.tuning import (
    Tuning,
    WgradTuning,
    candidates,
    cost_us,
    pick,
    pick_wgrad,
)
from whalejax.kernels.mosaic import SMEM_BYTES


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    m=st.integers(1, 10_000),
    n=st.integers(1, 4000).map(lambda x: 8 * x),
    k=st.integers(1, 1100).map(lambda x: 16 * x),
    out_itemsize=st.sampled_from([2, 4]),
)
def test_every_choice_fits(m, n, k, out_itemsize):
    t = pick(m, n, k, out_itemsize=out_itemsize, ctas=132)
    assert t.fits(out_itemsize)
    assert cost_us(t, m, n, k, 132) > 0
    assert all(other.fits(out_itemsize) for other in candidates(m, n, k, out_itemsize))


def test_few_tokens_get_narrow_tiles_and_many_get_wide_ones():
    few = pick(16, 4096, 7168, out_itemsize=2, ctas=132)
    many = pick(8192, 8192, 8192, out_itemsize=2, ctas=132)
    assert few.tile_m == 64 and -(-4096 // few.tile_n) > 100  # most multiprocessors read weights
    assert many.tile_m * many.tile_n >= 128 * 192


def test_small_groups_get_low_tiles():
    """A group's last tile is empty for the most part where groups are smaller than tiles."""
    sizes = {"n": 4096, "k": 7168, "groups": 16, "out_itemsize": 2, "ctas": 132}
    assert pick(40, **sizes).tile_m == 64
    assert pick(8192, **sizes).tile_m == 256


def test_weight_gradients_fill_the_multiprocessors():
    assert pick_wgrad(8192, 8192, 8192, ctas=132).tile_m == 256
    assert pick_wgrad(128, 1024, 8192, ctas=132).tile_m == 128  # eight tiles of either height


def test_a_measured_tuning_goes_before_the_cost_model(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"a GPU": {"8x16x32x2": {"tile_m": 64, "tile_n": 24}}}))
    monkeypatch.setattr(tuning, "USER_TABLE", path)
    tuning.table.cache_clear()
    try:
        assert pick(8, 16, 32, out_itemsize=2, ctas=132, device="a GPU").tile_n == 24
        assert pick(8, 16, 32, out_itemsize=2, ctas=132, device="another").tile_n == 16
    finally:
        tuning.table.cache_clear()


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "cache" / "table.json"
    assert tuning.read_table(path) == {}
    tunings = {"a GPU": {"8x16x32x2": Tuning(tile_m=64, tile_n=24, cluster=2, share="x")}}
    tuning.write_table(path, tunings)
    assert tuning.read_table(path) == tunings
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ('{"a GPU": {"8x16x32x2": {"tile": 64}}}', "'tile'"),
        ('{"a GPU": {"8x16x32x2": {"tile_m": 96}}}', "tile_m=96 must be 64, 128 or 256"),
    ],
)
def test_a_table_that_holds_no_tunings_is_named(tmp_path, text, says):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table.json does not hold tunings: .*{says}"):
        tuning.read_table(path)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tile_m": 96}, "tile_m=96 must be 64, 128 or 256"),
        ({"tile_n": 100}, "tile_n=100 a multiple of 8"),
        ({"tile_m": 256, "tile_n": 192}, "at most 128"),
        ({"share": "y"}, "share='y' must be 'w' or 'x'"),
        ({"bands": "x"}, "bands='x' 'rows' or 'columns'"),
        ({"stages": 1}, "stages=1 must be at least 2"),
        ({"tile_n": 56, "cluster": 2}, "tile_n=56, shared by cluster=2, .* multiple of 16"),
    ],
)
def test_a_wrong_tuning_fails_when_it_is_made(sizes, says):
    with pytest.raises(ValueError, match=says):
        Tuning(**sizes)


def test_weight_gradients_fit():
    assert all(t.smem_bytes() <= SMEM_BYTES for t in tuning.WGRAD_US)
    with pytest.raises(ValueError, match="tile_n=176 a multiple of 32 and at most 160"):
        WgradTuning(tile_n=176)
