"""The vision transformer of DINOv2, whose features losses look through.

Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023, as transformers'
Dinov2Model computes it.

Axes: B batch, L layers, T positions (the class token, then patches row by row), D width.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from instella_jax.models.attention import attend
from instella_jax.models.layers import Execution, learned_layer_norm, linear, partitioned, repeat
from instella_jax.models.pixels import to_patches

# Mean and deviation of ImageNet's colours, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
# The sharpness of torch's bicubic interpolation.
_CUBIC = -0.75


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the network, by the names of transformers' config.

    Attributes:
      hidden_size: D.
      num_hidden_layers: L.
      num_attention_heads: heads of a block.
      mlp_ratio: hidden units of the MLP by the width.
      layer_norm_eps: of all norms.
      image_size: pixels of a side that the positions were learned at.
      patch_size: pixels of a side of a patch.
      qkv_bias: whether queries, keys and values have a bias.
      use_swiglu_ffn: whether the MLP is gated, as in the giant.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    @property
    def side(self) -> int:
        """Patches of a side that the positions were learned at."""
        return self.image_size // self.patch_size

    @property
    def hidden_units(self) -> int:
        """Hidden units of the MLP; of a gated one two thirds, up to a multiple of eight."""
        plain = int(self.hidden_size * self.mlp_ratio)
        return (int(plain * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else plain


def bicubic(source: int, target: int) -> Float32[np.ndarray, "{target} {source}"]:
    """Return the matrix by which torch resizes an axis bicubically, its ends repeated."""

    def weight(distance: float) -> float:
        d, a = abs(distance), _CUBIC
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = np.zeros((target, source), np.float32)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        first = math.floor(centre) - 1
        for place in range(first, first + 4):
            matrix[row, min(max(place, 0), source - 1)] += weight(centre - place)
    return matrix


class VisionBlock(nn.Module):
    """Attention and MLP, each scaled by channel, written for `layers.repeat`."""

    config: VisionConfig
    run: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Array]:
        """Return the result twice, as what goes on and as what is kept."""
        c, run, width = self.config, self.run, x.shape[-1]
        heads = (*x.shape[:2], c.num_attention_heads, -1)

        def dense(
            name: str, x: Float[Array, "B T D_in"], features: int, bias: bool = True
        ) -> Float[Array, "B T D_out"]:
            layer = linear(features, x.shape[-1], ("embed", None), run, use_bias=bias, name=name)
            return layer(x)

        def scaled(name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            ones = partitioned(nn.initializers.ones_init(), (None,))
            return x * self.param(name, ones, (width,), run.param_dtype).astype(run.dtype)

        h = learned_layer_norm(run, "norm1", c.layer_norm_eps)(x)
        q, k, v = (dense(name, h, width, c.qkv_bias).reshape(heads) for name in "qkv")
        mixed = attend(q, k, v, None, run.attention).reshape(x.shape)
        x += scaled("scale1", dense("o", mixed, width))
        h = learned_layer_norm(run, "norm2", c.layer_norm_eps)(x)
        up = dense("up", h, c.hidden_units)
        if c.use_swiglu_ffn:
            up = nn.silu(dense("gate", h, c.hidden_units)) * up
        else:
            up = nn.gelu(up, approximate=False)
        x += scaled("scale2", dense("down", up, width))
        return x, x


class VisionTransformer(nn.Module):
    """Images to the features of their patches."""

    config: VisionConfig
    run: Execution = Execution()

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width 3"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """Return the normalised features, and those after each block as they are.

        Positions are interpolated to the grid of the images.

        Args:
          images: in [-1, 1], their sides multiples of the patch size.
        """
        c, run, width = self.config, self.run, self.config.hidden_size

        def learned(name: str, *shape: int) -> Float[Array, "*axes D"]:
            init = partitioned(nn.initializers.normal(0.02), (None,) * len(shape))
            return jnp.asarray(self.param(name, init, shape, run.param_dtype), jnp.float32)

        colours = ((images + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
        patches = to_patches(colours.astype(run.dtype), c.patch_size)
        batch, rows, columns, size = patches.shape
        embed = linear(width, size, (None, "embed"), run, use_bias=True, name="patch_embed")
        x = embed(patches).reshape(batch, rows * columns, width)
        first = jnp.broadcast_to(learned("class_token", width), (batch, 1, width))
        places = learned("positions", 1 + c.side**2, width)
        grid = places[1:].reshape(c.side, c.side, width)
        down, across = bicubic(c.side, rows), bicubic(c.side, columns)
        exact = jax.lax.Precision.HIGHEST
        grid = jnp.einsum("rs,ct,std->rcd", down, across, grid, precision=exact)
        places = jnp.concatenate([places[:1], grid.reshape(-1, width)])
        x = (jnp.concatenate([first, x], 1) + places).astype(run.dtype)
        blocks = repeat(VisionBlock, c.num_hidden_layers, run)
        x, states = blocks(c, run, name="blocks")(x)
        return learned_layer_norm(run, "norm", c.layer_norm_eps)(x), states
