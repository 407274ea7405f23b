"""Images as networks see them, their patches, and how far two of them are apart.

Axes: B batch.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

# Pixels of a side of the window of SSIM.
SSIM_SIDE = 11

Images = Float[Array, "B height width 3"] | Float[np.ndarray, "B height width 3"]


def to_float(images: UInt8[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Map uint8 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    """Map [-1, 1], clipped, to uint8."""
    clipped = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
    return jnp.round((clipped + 1.0) * 127.5).astype(jnp.uint8)


def psnr(a: Images, b: Images, span: float = 2.0) -> Float[Array, " B"]:
    """Return the peak signal-to-noise ratio in dB, 106 for images that are the same.

    Args:
      a: images.
      b: what they should be.
      span: of the values from black to white, 2 for [-1, 1].
    """
    mse = (((a - b) / span) ** 2).mean(axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(mse, 2.5e-11))


def ssim(a: Images, b: Images) -> Float[Array, " B"]:
    """Return the structural similarity, 1 for images that are the same.

    Wang et al., 2004: a Gaussian window of 11x11 pixels with deviation 1.5, where it lies within
    the image, weighted moments (not sample moments), each channel by itself, then the mean.

    Args:
      a: images in [0, 1], of 11 pixels a side at least.
      b: others.
    """
    place = jnp.arange(SSIM_SIDE) - SSIM_SIDE // 2
    weights = jnp.exp(-0.5 * (place / 1.5) ** 2)
    weights /= weights.sum()

    def blur(x: Images) -> Float[Array, "B h w 3"]:
        rows, columns = x.shape[1] - SSIM_SIDE + 1, x.shape[2] - SSIM_SIDE + 1
        zero, steps = jnp.zeros(()), range(SSIM_SIDE)
        down = sum((weights[i] * x[:, i : i + rows] for i in steps), start=zero)
        return sum((weights[i] * down[:, :, i : i + columns] for i in steps), start=zero)

    # Moments about the middle of the range: less is lost where their differences are taken.
    x, y = a - 0.5, b - 0.5
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return similar.mean(axis=(1, 2, 3))


def to_patches(
    images: Float[Array, "B height width 3"], side: int
) -> Float[Array, "B height//{side} width//{side} {side}*{side}*3"]:
    """Cut images into patches.

    A patch is laid out (row, column, channel), as the decoder's output is.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // side, width // side
    patches = images.reshape(batch, rows, side, columns, side, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def from_patches(
    patches: Float[Array, "B rows columns {side}*{side}*3"], side: int
) -> Float[Array, "B rows*{side} columns*{side} 3"]:
    """Put patches together again, see `to_patches`."""
    batch, rows, columns, _ = patches.shape
    pixels = patches.reshape(batch, rows, columns, side, side, 3)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, 3)
