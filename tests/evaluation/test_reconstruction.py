"""Figures of a tokenizer's copies, against formulas of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from instella_jax import BinaryTokenizer
from instella_jax.errors import UserError
from instella_jax.evaluation.reconstruction import figures, measure
from instella_jax.models.pixels import ssim


def pictures(count, height, width, seed=0):
    """Smooth ones, as scikit-image would blur noise."""
    noise = np.random.default_rng(seed).random((count, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3, 0))
    low, high = smooth.min(), smooth.max()
    return np.round((smooth - low) / (high - low) * 255).astype(np.uint8)


def ssim_in_float64(a, b):
    """Wang et al. 2004, with the filter of scipy in the place of ours; values in [0, 1]."""
    scores = []
    for channel in range(3):
        x, y = a[..., channel].astype(np.float64), b[..., channel].astype(np.float64)

        def blur(z):
            # Five pixels of the border see the mirror image beyond it, and are left out.
            return ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]

        ux, uy = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - ux**2, blur(y * y) - uy**2, blur(x * y) - ux * uy
        top = (2 * ux * uy + 0.01**2) * (2 * vxy + 0.03**2)
        bottom = (ux**2 + uy**2 + 0.01**2) * (vx + vy + 0.03**2)
        scores.append((top / bottom).mean())
    return np.mean(scores)


def test_ssim_is_that_of_an_independent_formula():
    a = pictures(6, 40, 57)
    noise = np.random.default_rng(1).normal(0, 20, a.shape)
    b = np.clip(a + noise * np.arange(6)[:, None, None, None] / 3, 0, 255).astype(np.uint8)
    a[0, 5:25] = b[0, 5:25] = 250  # flat, where differences of moments lose most
    found = np.asarray(ssim(jnp.asarray(b, jnp.float32) / 255, jnp.asarray(a, jnp.float32) / 255))
    expected = [ssim_in_float64(x / 255, y / 255) for x, y in zip(b, a, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found[0] == pytest.approx(1, abs=1e-6) and np.all(np.diff(found) < 0)


def test_psnr_is_that_of_its_definition():
    a, b = pictures(3, 20, 30), pictures(3, 20, 30, seed=1)
    error = np.mean((a.astype(np.float64) - b) ** 2, axis=(1, 2, 3))
    expected = 10 * np.log10(255**2 / error)
    np.testing.assert_allclose(figures(a, b, None)["psnr"], expected, rtol=1e-5)


def test_small_pictures_have_no_ssim():
    assert set(figures(pictures(2, 10, 40), pictures(2, 10, 40), None)) == {"psnr"}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return BinaryTokenizer.from_pretrained(tiny_tokenizer_folder)


def test_means_are_those_of_all_pictures_each_counted_once(tokenizer):
    side = tokenizer.shapes[0][0]
    images = pictures(11, side, side)
    done = []
    batches = [images[:4], images[4:8], images[8:]]
    report = measure(tokenizer, batches, show=done.append)
    assert done == [4, 8, 11] and report["pictures"] == 11
    codes = tokenizer.encode(images)
    copies = tokenizer.decode(codes)
    expected = [ssim_in_float64(y / 255, x / 255) for x, y in zip(images, copies, strict=True)]
    assert report["scores"]["ssim"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert report["deviations"]["ssim"] == pytest.approx(np.std(expected), abs=1e-3)
    assert report["worst"]["ssim"] == pytest.approx(np.min(expected), abs=1e-3)
    assert report["bits_on"] == pytest.approx(codes.mean(), abs=0.01)
    constant = np.sum((codes == codes[:1]).all(0))
    assert abs(report["constant_bits"] - constant) <= 2
    assert report["bits_per_pixel"] == tokenizer.num_tokens * tokenizer.bits / side**2
    assert report["image_size"] == [side, side]
    with pytest.raises(UserError, match="no pictures"):
        measure(tokenizer, [])


def test_the_first_tokens_alone_are_decoded_where_that_was_trained(tokenizer):
    side = tokenizer.shapes[0][0]
    images = pictures(5, side, side)
    with pytest.raises(UserError, match="train one with loss.tail_drop"):
        measure(tokenizer, [images], tokens=1)
    nested = BinaryTokenizer(
        tokenizer.network, tokenizer.params, shapes=tokenizer.shapes, nested=True
    )
    report = measure(nested, [images], tokens=1)
    codes = tokenizer.encode(images)
    codes[:, 1:] = 0
    expected = figures(images, tokenizer.decode(codes), None)["psnr"]
    assert report["scores"]["psnr"] == pytest.approx(expected.mean(), rel=1e-4)
    assert report["bits"] == tokenizer.bits


@pytest.mark.slow
def test_lpips_is_there_with_its_weights(tokenizer):
    from instella_jax.losses.perceptual import Vgg16, lpips

    vgg = Vgg16().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    widths = (64, 128, 256, 512, 512)
    params = {"vgg": vgg, "heads": {f"head_{n}": jnp.ones(w) / w for n, w in enumerate(widths)}}
    side = tokenizer.shapes[0][0]
    images = pictures(3, side, side)
    report = measure(tokenizer, [images], lpips_params=params)
    x, y = (jnp.asarray(z, jnp.float32) / 127.5 - 1 for z in (images, tokenizer.decode(
        tokenizer.encode(images))))  # fmt: skip
    each = np.asarray(lpips(params, x, y))
    assert report["scores"]["lpips"] == pytest.approx(each.mean(), rel=0.02)
    assert report["worst"]["lpips"] == pytest.approx(each.max(), rel=0.02)
