"""Losses through the patches' features of a frozen vision network.

Alignment is REPA's (Yu et al., 2024), of the states of the decoder.

Axes: B batch, S states of several blocks, D width of the features.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.functional import Params, apply
from instella_jax.models.vision_transformer import VisionTransformer

Pictures = Float[Array, "B height width 3"]
Grid = tuple[int, int]


def patch_features(
    network: VisionTransformer, params: Params, images: Pictures, grid: Grid
) -> Float[Array, "B {grid[0]} {grid[1]} D"]:
    """Return the normalised features of images on a grid, float32.

    Args:
      network: that is looked through.
      params: of it.
      images: in [-1, 1]; they are resized so that each cell of the grid is a patch.
      grid: rows and columns.
    """
    last, _ = apply(network, params, _fitted(network, images, grid))
    return last[:, 1:].reshape(len(images), *grid, -1).astype(jnp.float32)


def block_features(
    network: VisionTransformer, params: Params, images: Pictures, grid: Grid, count: int
) -> Float[Array, "{count} B {grid[0]} {grid[1]} D"]:
    """Return the features after several blocks, which lie evenly and of which the last is one.

    Args:
      network: that is looked through.
      params: of it.
      images: see `patch_features`.
      grid: rows and columns.
      count: of the blocks.
    """
    _, states = apply(network, params, _fitted(network, images, grid))
    depth = network.config.num_hidden_layers
    chosen = jnp.stack([states[depth * (n + 1) // count - 1] for n in range(count)])
    return chosen[:, :, 1:].reshape(count, len(images), *grid, -1)


def _fitted(network: VisionTransformer, images: Pictures, grid: Grid) -> Float[Array, "B h w 3"]:
    rows, columns = (network.config.patch_size * n for n in grid)
    return jax.image.resize(images, (len(images), rows, columns, 3), "cubic")


def feature_distance(
    network: VisionTransformer, params: Params, copies: Pictures, images: Pictures, grid: Grid
) -> Float[Array, ""]:
    """Return the mean distance of the patches of reconstructions from those of images, 0 to 2."""
    looks = (patch_features(network, params, x, grid) for x in (copies, images))
    return cosine_distance(*looks)


def cosine_distance(a: Float[Array, "*axes D"], b: Float[Array, "*axes D"]) -> Float[Array, ""]:
    """Return the mean of 1 less the cosine of vectors, 0 to 2."""

    def unit(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)

    return 1.0 - jnp.mean(jnp.sum(unit(a) * unit(b), axis=-1))
