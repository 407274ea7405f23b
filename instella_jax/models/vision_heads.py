"""What is trained on top of a frozen vision network's features, or towards them.

Axes: B batch, S states of several blocks, D width, F width of the features.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.convolution import same_convolution
from instella_jax.models.discriminator import SLOPE
from instella_jax.models.layers import (
    Execution,
    layer_norm,
    learned_layer_norm,
    linear,
    partitioned,
)


class AlignmentHead(nn.Module):
    """Linear, LayerNorm, ReLU, linear: from the decoder's states to features.

    Attributes:
      width: D.
      features: F.
      run: how it is computed.
    """

    width: int
    features: int
    run: Execution = Execution()

    @nn.compact
    def __call__(self, states: Float[Array, "B h w D"]) -> Float[Array, "B h w F"]:
        """Return float32 guesses of the features."""
        axes, run = ("embed", None), self.run
        x = states.astype(run.dtype)
        x = linear(self.width, self.width, axes, run, use_bias=True, name="hidden")(x)
        x = learned_layer_norm(run, "norm")(x)
        out = linear(self.features, self.width, axes, run, use_bias=True, name="out")
        return out(nn.relu(x)).astype(jnp.float32)


class FeatureDiscriminator(nn.Module):
    """A small head for each of several blocks of a frozen network, which tells pictures from
    reconstructions by its features (Sauer et al., StyleGAN-T, 2023).

    Attributes:
      features: F.
      heads: S.
      width: channels of a head.
      run: how it is computed.
    """

    features: int
    heads: int
    width: int
    run: Execution = Execution()

    @nn.compact
    def __call__(self, states: Float[Array, "S B h w F"]) -> Float[Array, "S B h w"]:
        """Return float32 logits of "this is a picture" of each head at each patch."""
        run, answers = self.run, []
        # What it has lately answered to pictures and to reconstructions, for LeCam.
        self.param("answers", partitioned(nn.initializers.zeros_init(), (None,)), (2,))

        for number in range(self.heads):
            # Blocks differ in scale by orders of magnitude.
            x = layer_norm(states[number].astype(run.dtype))
            x = nn.leaky_relu(same_convolution(self.width, 1, run, f"in_{number}")(x), SLOPE)
            y = same_convolution(self.width, 3, run, f"around_{number}")(x)
            x = (x + nn.leaky_relu(y, SLOPE)) * 0.5**0.5
            answers.append(same_convolution(1, 1, run, f"out_{number}")(x)[..., 0])
        return jnp.stack(answers).astype(jnp.float32)
