import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.models.pixels import psnr, to_float, to_uint8


def test_every_level_goes_to_the_networks_range_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    floats = np.asarray(to_float(jnp.asarray(levels)))
    assert floats.dtype == np.float32 and (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_allclose(floats, (levels.astype(float) - 127.5) / 127.5, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(floats)), levels)


def test_floats_go_to_the_nearest_level_and_no_further():
    levels = np.array([0.4, 0.6, 99.4, 99.6, 254.4, 254.6])
    given = np.append(levels / 127.5 - 1, [-7.0, 1.2]).astype(np.float32)
    assert to_uint8(jnp.asarray(given)).tolist() == [0, 1, 99, 100, 254, 255, 0, 255]


def test_psnr_has_the_peak_of_its_range():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 1
    b[1, ..., 0] += 30
    a, b = jnp.asarray(a), jnp.asarray(b)
    wanted = [20 * np.log10(255), 10 * np.log10(255**2 / 300)]
    np.testing.assert_allclose(psnr(to_float(a), to_float(b)), wanted, rtol=1e-4)
    assert psnr(to_float(a), to_float(a)).max() == pytest.approx(10 * np.log10(4 / 1e-10), rel=1e-4)
