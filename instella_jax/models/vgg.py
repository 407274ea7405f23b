"""VGG16, and LPIPS, the distance of two images in its features.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, in its
version 0.1.

Axes: B batch, C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from instella_jax.errors import UserError
from instella_jax.models.convolution import convolve

# Widths of the convolutions between one pooling and the next.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Four poolings halve the sides, and something must be left.
MIN_SIDE = 16
# Mean and deviation of ImageNet's colours, as LPIPS has them for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_TINY = 1e-10


class Vgg16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman, 2014)."""

    @nn.compact
    def __call__(self, images: Float[Array, "B height width 3"]) -> list[Float[Array, "B h w C"]]:
        """Return the five feature maps before each pooling and at the end, for images in [-1, 1].

        The h and w of each are half of those before it, C is 64, 128, 256, 512 and 512.
        """
        x = (images - jnp.asarray(_SHIFT, images.dtype)) / jnp.asarray(_SCALE, images.dtype)
        maps, number = [], 0
        for stage, widths in enumerate(STAGES):
            if stage:
                x = halve(x)
            for width in widths:
                conv = nn.Conv(
                    width, (3, 3), padding=1, conv_general_dilated=convolve, name=f"conv_{number}"
                )
                x = nn.relu(conv(x))
                number += 1
            maps.append(x)
        return maps


def halve(x: Float[Array, "B h w C"]) -> Float[Array, "B h//2 w//2 C"]:
    """Return the maximum of every 2x2 cell; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    cells = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    # On a CPU its gradient is far quicker than that of a windowed maximum.
    return cells.max((2, 4))


class Heads(nn.Module):
    """A weight for each channel of each map."""

    @nn.compact
    def __call__(self) -> list[Float[Array | np.ndarray, " C"]]:
        """Return the weights, all 1 until they are read."""
        ones = nn.initializers.ones_init()
        return [self.param(f"head_{n}", ones, (widths[-1],)) for n, widths in enumerate(STAGES)]


class Lpips(nn.Module):
    """The distance of two images; see `losses.perceptual.lpips`."""

    @nn.compact
    def __call__(
        self, images_a: Float[Array, "B height width 3"], images_b: Float[Array, "B height width 3"]
    ) -> Float[Array, " B"]:
        """Return the distances of pairs of images in [-1, 1].

        Raises:
          UserError: the images are too small.
        """
        if min(images_a.shape[1:3]) < MIN_SIDE:
            raise UserError(
                f"LPIPS of {images_a.shape[1]}x{images_a.shape[2]} pixels: VGG16 needs at least "
                f"{MIN_SIDE} a side"
            )
        vgg = Vgg16(name="vgg")
        distance = jnp.zeros(len(images_a))
        for a, b, head in zip(vgg(images_a), vgg(images_b), Heads(name="heads")(), strict=True):
            distance += (jnp.square(unit(a) - unit(b)) @ head).mean((1, 2))
        return distance


def unit(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Divide each position by its norm plus 1e-10; where all is 0, value and gradient are 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = square > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0) + _TINY)
