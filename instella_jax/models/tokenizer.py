"""The 1D binary tokenizer: an image <-> N tokens of K bits.

The mathematics: "Tokenizer" in docs/model.md.

Axes: B batch, N latent tokens, K bits, D width, P patch; an image grid has `rows` x `columns`
patches. Images are [B, height, width, 3] in [-1, 1].
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.layers import Execution, linear, partitioned, rms_norm
from instella_jax.models.pixels import from_patches, to_patches
from instella_jax.models.quantizers import hard_code
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.models.trunk import Downsample, Trunk, Upsample


class Encoder(nn.Module):
    """Image -> latent positions."""

    config: TokenizerConfig
    run: Execution

    @nn.compact
    def __call__(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B N D"]:
        c, run = self.config, self.run
        c.grid(images.shape[1], images.shape[2], len(c.downsample_after))
        width = c.encoder_width
        patches = linear(
            width, 3 * c.patch_size**2, (None, "embed"), run, use_bias=True, name="patch_embed"
        )(to_patches(images, c.patch_size))
        latent = self.param(
            "latent_tokens",
            partitioned(nn.initializers.normal(0.02), (None, "embed")),
            (c.num_tokens, width),
            run.param_dtype,
        )
        latent = jnp.broadcast_to(latent.astype(run.dtype), (images.shape[0], *latent.shape))
        trunk = Trunk(
            c, c.encoder_layers, c.encoder_heads, c.encoder_head_dim, c.downsample_after,
            Downsample, True, run, name="trunk",
        )  # fmt: skip
        scale = None if c.scale is None else c.scale // c.patch_size
        latent = trunk(latent, patches, scale)
        latent = rms_norm(run, "out_norm")(latent)
        return linear(width, width, ("embed", None), run, use_bias=True, name="out")(latent)


class Decoder(nn.Module):
    """Latent vectors -> image of any grid."""

    config: TokenizerConfig
    run: Execution
    tapped: int | None = None

    @nn.compact
    def __call__(
        self, latent: Float[Array, "B N D"], height: int, width: int
    ) -> Float[Array, "B {height} {width} 3"]:
        """Return images, nominally in [-1, 1]."""
        c, run = self.config, self.run
        rows, columns = c.grid(height, width, len(c.upsample_after))
        batch, _, encoder_width = latent.shape
        latent = rms_norm(run, "in_norm")(latent)
        latent = linear(
            c.decoder_width, encoder_width, ("embed", None), run, use_bias=True, name="in"
        )(latent)
        shrink = 2 * len(c.upsample_after) or 1
        mask = self.param(
            "mask_token",
            partitioned(nn.initializers.normal(0.02), ("embed",)),
            (c.decoder_width,),
            run.param_dtype,
        )
        grid = (batch, rows // shrink, columns // shrink, c.decoder_width)
        scale = None if c.scale is None else c.scale // c.patch_size // shrink
        trunk = Trunk(
            c, c.decoder_layers, c.decoder_heads, c.decoder_head_dim, c.upsample_after,
            Upsample, False, run, self.tapped, name="trunk",
        )  # fmt: skip
        image = trunk(latent, jnp.broadcast_to(mask.astype(run.dtype), grid), scale)
        image = rms_norm(run, "out_norm")(image)
        pixels = linear(
            3 * c.patch_size**2, c.decoder_width, ("embed", None), run, use_bias=True, name="pixels"
        )(image)
        return from_patches(pixels, c.patch_size)


class TokenizerNetwork(nn.Module):
    """Encoder, quantizer and decoder.

    `encode` gives the logits of the bits; `sample_code` or `hard_code` makes bits of them;
    `decode` makes the image of a code, and can sow what the decoder's image positions are after
    block `tapped`, see `Trunk`.
    """

    config: TokenizerConfig
    run: Execution = Execution()
    tapped: int | None = None

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.run)
        self.to_bits = linear(c.bits, c.encoder_width, ("embed", None), self.run, use_bias=True)
        self.embed = self.param(
            "embed",
            partitioned(nn.initializers.normal(0.02), (None, "embed")),
            (c.bits, c.encoder_width),
            self.run.param_dtype,
        )
        self.decoder = Decoder(c, self.run, self.tapped)

    def __call__(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B height width 3"]:
        """Reconstruct images through their hard code."""
        code = hard_code(self.encode(images))
        return self.decode(code, *images.shape[1:3])

    def encode(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B N K"]:
        """Map images in [-1, 1] to the logits of their bits.

        Raises:
          UserError: if the sides are not multiples of the patch size times 2^downsamplings.
        """
        logits = self.to_bits(self.encoder(images.astype(self.run.dtype)))
        return logits.astype(self.run.output_dtype)

    def decode(
        self, code: Float[Array, "B N K"], height: int, width: int
    ) -> Float[Array, "B {height} {width} 3"]:
        """Map codes of 0 and 1 to images, about in [-1, 1].

        Any size may be asked for, whatever the size of the image that was encoded.

        Raises:
          UserError: if the sides are not multiples of the patch size times 2^upsamplings.
        """
        latent = jnp.dot(code.astype(self.run.dtype), self.embed.astype(self.run.dtype))
        return self.decoder(latent, height, width).astype(self.run.output_dtype)
