import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.quantization import QuantizedArray
from whalejax.kernels.quantization.array import scales_shape


def draw(shape, tile=(128, 128)):
    keys = jax.random.split(jax.random.key(0), 2)
    values = (jax.random.normal(keys[0], shape) * 30).astype(jnp.float8_e4m3fn)
    scales = jax.random.uniform(keys[1], scales_shape(shape, tile), minval=0.1)
    return QuantizedArray(values, scales, tile)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (2, 3, 140, 100)], ids=str)
@pytest.mark.parametrize("tile", [(128, 128), (1, 128)], ids=str)
def test_dequantises_partial_tiles_exactly(shape, tile):
    array = draw(shape, tile)
    values, scales = np.asarray(array.values, np.float64), np.asarray(array.scales, np.float64)
    rows, columns = np.arange(shape[-2]) // tile[0], np.arange(shape[-1]) // tile[1]
    truth = values * scales[..., rows, :][..., columns]
    assert array.shape == shape and array.ndim == len(shape)
    np.testing.assert_allclose(array.dequantize(), truth, rtol=2**-23)
    assert array.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_passes_through_jit_and_scan():
    array = draw((3, 130, 140))
    whole = array.dequantize()

    def body(carry, layer):
        assert isinstance(layer, QuantizedArray) and layer.tile == (128, 128)
        return carry, layer.dequantize()

    stacked = jax.jit(lambda a: jax.lax.scan(body, 0, a)[1])(array)
    np.testing.assert_array_equal(stacked, whole)
    assert jax.tree.structure(array) == jax.tree.structure(jax.tree.map(jnp.zeros_like, array))
