"""A convolutional judge of patches, which tells pictures from reconstructions.

PatchGAN (Isola et al., 2017) that halves its maps by a blur (Zhang, 2019), so that it does not see
the grid of its own strides.

Axes: B batch, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.convolution import same_convolution
from instella_jax.models.layers import Execution, learned_layer_norm, partitioned

SLOPE = 0.2


def blur_halve(x: Float[Array, "B h w C"]) -> Float[Array, "B (h+1)//2 (w+1)//2 C"]:
    """Blur by [1, 2, 1] / 4 both ways and keep every other row and column; edges are repeated."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        padded, length = jnp.pad(x, pad, mode="edge"), x.shape[axis]
        left, middle, right = (
            jax.lax.slice_in_dim(padded, start, start + length, stride=2, axis=axis)
            for start in range(3)
        )
        x = (left + 2 * middle + right) / 4
    return x


class Discriminator(nn.Module):
    """Logits of "this is a picture", one for each patch.

    Attributes:
      width: channels at full size; doubled at each halving, up to eight times.
      halvings: how often the maps are halved.
      run: how it is computed.
    """

    width: int
    halvings: int
    run: Execution = Execution()

    @nn.compact
    def __call__(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B h w"]:
        """Return float32 logits for images in [-1, 1]."""
        run = self.run
        # What it has lately answered to pictures and to reconstructions, for LeCam.
        self.param("answers", partitioned(nn.initializers.zeros_init(), (None,)), (2,))
        x = nn.leaky_relu(
            same_convolution(self.width, 3, run, "conv_in")(images.astype(run.dtype)), SLOPE
        )
        for number in range(self.halvings):
            width = self.width * min(2 ** (number + 1), 8)
            x = same_convolution(width, 3, run, f"conv_{number}")(x)
            # Without a norm over the batch: a picture's answer is its own.
            x = learned_layer_norm(run, f"norm_{number}")(x)
            x = blur_halve(nn.leaky_relu(x, SLOPE))
        return same_convolution(1, 3, run, "conv_out")(x)[..., 0].astype(jnp.float32)
