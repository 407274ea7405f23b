import numpy as np
import pytest

from instella_jax.evaluation.pca import PcaCodec, components, lloyd_max, quantize


def test_lloyd_max_finds_the_levels_of_a_normal():
    values = np.random.default_rng(0).normal(size=200_000)
    # Max (1960), table I: the best 4 levels of a standard normal, error 0.1175.
    levels = lloyd_max(values, 4)
    np.testing.assert_allclose(levels, [-1.510, -0.4528, 0.4528, 1.510], atol=0.02)
    error = np.mean((values - levels[quantize(values, levels)]) ** 2)
    assert error == pytest.approx(0.1175, abs=0.002)


def test_bits_are_spent_in_full_and_where_they_help():
    rng = np.random.default_rng(1)
    scales = np.array([8.0, 4.0, 1.0, 0.1])
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0][:4]
    pictures = (rng.normal(size=(4_000, 4)) * scales) @ basis + 3.0
    codec = PcaCodec(pictures[:2_000], bits=8)
    spent = [int(np.log2(len(level))) for level in codec.levels]
    assert sum(spent) == 8 and spent[0] > spent[2] and len(spent) == 4
    error = np.mean((codec(pictures[2_000:]) - pictures[2_000:]) ** 2) * 12
    # Rate-distortion bound of a Gaussian (reverse water-filling) and 3 dB above it.
    bound = 3 * (8 * 4 * 1) ** (2 / 3) * 2 ** (-2 * 8 / 3) + 0.01
    assert bound < error < 2.5 * bound


@pytest.mark.parametrize("count", [40, 90])
def test_components_are_the_first_right_singular_vectors(count):
    """More numbers than pictures, and fewer."""
    pictures = np.random.default_rng(2).normal(size=(count, 3)) @ np.diag([5.0, 3.0, 1.0])
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(60, 60)))[0][:3]
    centred = ((pictures - pictures.mean(0)) @ basis).astype(np.float32)
    wanted = np.linalg.svd(centred, full_matrices=False)[2]
    for most, kept in ((2, 2), (8, 3)):
        found = components(centred, most)
        assert found.shape == (kept, 60)
        np.testing.assert_allclose(np.abs(found @ wanted[:kept].T), np.eye(kept), atol=1e-3)
